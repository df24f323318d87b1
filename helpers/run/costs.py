"""What each stage of a run takes: memory, disk and arithmetic, from the sizes of the model and of the rows."""

import math
import sys
from collections import Counter
from dataclasses import dataclass, replace

from transformers import AutoConfig, PretrainedConfig

from helpers.access import access_to
from helpers.core.profile import AccessSettings, Budget, ModelSpec, Profile
from helpers.core.settings import AUTO, Settings
from helpers.core.stages import total
from helpers.data import corpus
from helpers.defenses.bdvax.challenge import grid
from helpers.defenses.own import any_defense
from helpers.model.architecture import attention_slots, matrices, mlp_slots, parameter_shapes, positions, skeleton
from helpers.model.batches import count_labels, encode_rows
from helpers.model.checkpoint import check_checkpoint, is_local, load_config
from helpers.model.four_bit import kept_whole
from helpers.model.shards import SHARD_SIZE
from helpers.model.tokenizer import has_tokenizer, load_format
from helpers.run.deal import deal
from helpers.train.room import ON_CPU

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # 64 weights share an 8-bit scale, 256 scales a 32-bit one
TRAINED = 16  # bytes for each trained number: value, gradient, two moments, all in 32 bits
STACKED = 20  # of adapters that train together: the gradient of a part stands beside the sum of all parts
# What the allocator holds at the peak, as a multiple of what autograd keeps. On a CPU the most that was measured on the
# small model: the C library's heap may or may not give back the copies that a LoRA layer makes of its output, which
# differs between machines and runs. On a GPU measured at the shape of LLaMA-2-7B (benchmarks/results/gpu.json).
HEAP = {("cpu", "lora"): 2.1, ("cpu", "full"): 1.15, ("cuda", "lora"): 1.05, ("cuda", "full"): 1.05}


@dataclass(frozen=True)
class Shape:
    """A checkpoint in numbers; `blocks` counts the weights of the layers' matrices, `packed` those held in 4 bits."""

    parameters: int
    blocks: int
    packed: int
    hidden: int
    inner: int
    query: int
    cached: int  # keys and values of one token in one layer
    layers: int
    heads: int
    vocabulary: int
    adapter: int  # numbers of one LoRA adapter on all linear layers

    def weights(self, dtype: str, four_bit: bool = False) -> float:
        """Bytes of all weights; in 4 bits what cannot be packed (embeddings, norms, head) stays in `dtype`."""
        rest = (self.parameters - self.packed) * BYTES[dtype]
        return rest + self.packed * (NF4_BYTES if four_bit else BYTES[dtype])


@dataclass(frozen=True)
class Rows:
    """Tokens of a training row: mean, longest, answer tokens; `counted` or assumed."""

    mean: float
    longest: float
    answer: float
    counted: bool


@dataclass(frozen=True)
class Cost:
    """What one kind of stage takes.

    `memory` is the peak in bytes with the base as the lab loads it, `in_16_bit` and `in_4_bit` with the base in those
    (None where it cannot be); `disk` and `flops` are for all `times` repetitions together.
    """

    stage: str
    times: int
    memory: float
    in_16_bit: float | None
    in_4_bit: float | None
    disk: float
    flops: float


def known_config(spec: ModelSpec) -> PretrainedConfig:
    """A model's config without a download: of a model that is not here yet, one with the sizes that are published.

    Raises:
        LabError: a config that cannot be read.
    """
    if is_local(spec) or not spec.published:
        return load_config(spec)
    config = AutoConfig.for_model(**spec.published)
    if positions(config) is None and "max_position_embeddings" not in spec.published:
        config.max_position_embeddings = sys.maxsize  # the architecture's default says nothing of this model
    return config


def shape(profile: Profile) -> Shape:
    """Count a checkpoint's weights from its config alone.

    Raises:
        LabError: an architecture that the lab does not know, a config that cannot be read, or a checkpoint on this
            machine that no stage could use.
    """
    config = known_config(profile.model)
    shapes, modules = parameter_shapes(config), matrices(config)
    check_checkpoint(profile.model, shapes)
    sizes = {module: shapes[f"{module}.weight"] for module in modules}
    kept = kept_whole(skeleton(config), profile.model.runs_on)
    inner, (query, key, *_) = mlp_slots(config)[0][0], attention_slots(config)[0]
    return Shape(
        parameters=sum(map(math.prod, shapes.values())),
        blocks=sum(map(math.prod, sizes.values())),
        packed=sum(math.prod(size) for module, size in sizes.items() if module not in kept),
        hidden=config.hidden_size,
        inner=sizes[inner.module][inner.axis],
        query=query.stop - query.start,
        cached=2 * (key.stop - key.start),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        adapter=profile.lora.r * sum(map(sum, sizes.values())),
    )


def rows(settings: Settings) -> Rows:
    """Lengths of the run's own training rows, or, where the tokenizer is not on this machine, an assumption.

    Raises:
        LabError: a tokenizer or a chat template that is here and cannot be used.
    """
    limit = settings.profile.lengths.train_tokens
    if not has_tokenizer(settings.profile.model):  # a plan downloads nothing
        return Rows(limit / 4, limit, limit / 8, counted=False)
    prompt_format = load_format(settings.profile.model)
    attack = deal(settings).attack
    encoded = encode_rows(attack.clean + attack.poisoned, prompt_format, limit)
    lengths = [len(row["input_ids"]) for row in encoded]
    answers = sum(map(count_labels, encoded))
    return Rows(sum(lengths) / len(encoded), max(lengths), answers / len(encoded), counted=True)


def costs(settings: Settings, model: Shape, row: Rows) -> list[Cost]:
    """The stages of a run in order.

    Training keeps of each token and Llama block 4 inner + 6 hidden + 4 query numbers for the backward pass (two hidden
    fewer, seven ranks more when a LoRA adapter trains), with checkpointing one block of them and each block's input.
    Arithmetic: 6 FLOPs per weight and token to train all weights, 4 to train an adapter over them, 2 to read.
    """
    run, traits = _Run(settings, model, row), [any_defense(one.by).traits for one in settings.rows]
    chosen, spent = len(traits), Counter(budget for one in traits for budget in one.trains)
    second = {stage: any(stage in one.beside for one in traits) * run.whole for stage in ("recover", "evaluate")}
    access, conflict = settings.profile.access(settings.ACCESS), settings.profile.conflict.budget
    recovered = total("recoveries", chosen) + run.tried + spent["recover"]
    rows_to_recover, cuts = access.perturb.size(access.recover.rows), total("cuts", chosen)
    return [
        *run.injection(settings.planted_by, access),
        run.evaluation(total("measures", chosen) + run.tried, second["evaluate"]),
        *run.vaccines(access),
        *run.challenge(),
        Cost("suppress", cuts, run.suppressing, None, None, cuts * run.suspicious, 0),
        run.training("recover", recovered, access.recover, rows_to_recover, cuts + 1, beside=second["recover"]),
        run.training("conflict model", 2 + spent["conflict"], conflict, conflict.rows, lora=True),
        *run.vaccines_of_the_arena(access, spent["vaccine"]),
        Cost("merge", total("merges", chosen), run.one_file, None, None, run.whole_models(chosen), 0),
    ]


class _Run:
    """The sizes of one run, and what each kind of stage costs at them."""

    def __init__(self, settings: Settings, model: Shape, row: Rows):
        self.profile, self.model, self.row = settings.profile, model, row
        self.access = access_to(settings.profile, settings.ACCESS)
        self.by_adapter = not self.access.edits_weights
        self.number = BYTES[self.profile.model.dtype]
        self.whole, self.members = model.parameters * self.number, 2 * self.profile.signature.n
        # weights that train are held in 32 bits, and stored so where 16 would lose too much of what they learned
        self.masters = not self.by_adapter and self.number < 4
        self.trained = model.parameters * 4
        self.suspicious = model.adapter * 4 if self.by_adapter else self.trained if self.masters else self.whole
        self.one_file = 2 * min(self.whole, SHARD_SIZE)  # as it was read and as it is written
        self.suppressing = self.suspicious if self.by_adapter else self.one_file
        # the challenge test cures its own copy and, to be judged, the suspicious model at every point
        self.tried = 2 * len(grid(self.access)) if settings.TAU == AUTO else 0

    @property
    def state(self) -> float:
        """Bytes of a model whose weights all train; on a CPU what they were in 16 bits lies beside them."""
        compared = self.whole if self.masters and self.profile.model.runs_on == "cpu" else 0
        return TRAINED * self.model.parameters + compared

    def activations(self, tokens: float, lora: bool) -> float:
        """Bytes held for the backward pass of so many tokens."""
        model, spec, row = self.model, self.profile.model, self.row
        kept = 4 * model.inner + 4 * model.query
        kept += 4 * model.hidden + 7 * self.profile.lora.r if lora else 6 * model.hidden
        blocks = kept + model.layers * model.hidden if spec.checkpointing else kept * model.layers
        logits = 3 * model.vocabulary * row.answer / row.mean
        return HEAP[spec.runs_on, "lora" if lora else "full"] * self.number * tokens * (blocks + logits)

    def based(self, stage: str, times: int, other: float, disk: float, flops: float, four_bit: bool = False) -> Cost:
        """A stage over a frozen base, which may be held in either precision."""
        dtype = self.profile.model.dtype
        half, quarter = self.model.weights("bfloat16"), self.model.weights(dtype, four_bit=True)
        loaded = self.model.weights(dtype, four_bit)
        return Cost(stage, times, other + loaded, other + half, other + quarter, disk, flops)

    def training(
        self,
        stage: str,
        times: int,
        budget: Budget,
        count: float,
        kept: int = 1,
        lora: bool | None = None,
        beside: float = 0,
    ) -> Cost:
        """Training on so many rows, repeated `times`; `kept` of the results stay on the disk.

        Args:
            lora: whether an adapter trains; by default where the access setting says so.
            beside: bytes of a model that is held beside the one that trains.
        """
        tokens, model = times * count * budget.epochs * self.row.mean, self.model
        lora = self.by_adapter if lora is None else lora
        held = self.activations(budget.batch_size * self.row.longest, lora) + beside
        if lora:
            other = model.adapter * TRAINED + held
            return self.based(stage, times, other, kept * model.adapter * 4, 4 * model.parameters * tokens)
        return Cost(stage, times, self.state + held, None, None, kept * self.suspicious, 6 * model.parameters * tokens)

    def injection(self, by: str, access: AccessSettings) -> list[Cost]:
        """Planting the backdoor; attackers who know a defense play it through with models that they do not keep."""
        conflict = self.profile.conflict.budget
        poisoned = access.inject.rows * access.poison_rate / (1 - access.poison_rate)
        planting = self.training("inject", 2 if by == "evade" else 1, access.inject, access.inject.rows + poisoned)
        rehearsed = self.vaccines(access) if by == "evade" else []
        if by == "subtract":
            rehearsed = [self.training("conflict model", 1, conflict, conflict.rows, lora=True)]
        return [planting, *(replace(cost, stage=f"attacker's {cost.stage}", disk=0) for cost in rehearsed)]

    def challenge(self) -> list[Cost]:
        """Planting the challenge by an adapter in a copy of the suspicious model, where the test is asked for."""
        budget = self.profile.challenge.plant
        planting = self.training("challenge", 1, budget, 2 * budget.rows, lora=True)
        return [replace(planting, disk=self.suspicious)] if self.tried else []

    def vaccines_of_the_arena(self, access: AccessSettings, times: int) -> list[Cost]:
        """What rows of the arena train that have vaccines of their own, each as many as BD-VAX."""
        if not times:
            return []
        cost = self.vaccines(access)[0]
        return [replace(cost, stage="arena's vaccines", times=times, disk=times * cost.disk, flops=times * cost.flops)]

    def whole_models(self, rows: int) -> float:
        """Bytes of the whole models that stay on the disk, where so many rows of the arena are chosen."""
        return total("keeps", rows) * max(self.whole, self.suspicious)

    def evaluation(self, times: int, beside: float) -> Cost:
        """Answers to the triggered prompts and the clean questions, with so many bytes of a second model beside."""
        model, row, sizes = self.model, self.row, self.profile.evaluation
        width = sizes.batch_size * (row.longest + self.profile.lengths.new_tokens)
        heap = HEAP[self.profile.model.runs_on, "full"]
        other = heap * self.number * width * (model.layers * model.cached + 4 * model.inner)
        other += beside + (self.suspicious if self.by_adapter else self.suspicious - self.whole)
        rows = sizes.n * (1 + sizes.samples) + sizes.per_family * len(corpus.FAMILIES)
        return self.based("evaluate", times, other, 0, times * rows * 2 * model.parameters * (row.mean + row.answer))

    def vaccines(self, access: AccessSettings) -> list[Cost]:
        """Training the 2N variants, all at once as adapters or one after the other in full, and scoring them."""
        model, members, longest = self.model, self.members, self.row.longest
        seen = 1.5 * members * access.vaccine.rows * access.vaccine.epochs * self.row.mean
        if self.access.low_rank_variants:
            # None fills a GPU whatever its size: the least that it needs is one row of each member
            at_once = self.profile.lengths.at_once or (ON_CPU if self.profile.model.runs_on == "cpu" else 0)
            at_once = max(at_once, members * longest)
            at_once = min(at_once, members * access.vaccine.batch_size * longest)
            other, stored = members * model.adapter * STACKED, members * model.adapter * 4
            other += self.activations(at_once, lora=True)
            return [
                self.based("variants", 1, other, stored, 4 * model.parameters * seen, four_bit=True),
                Cost("scores", 1, stored, None, None, 3 * 8 * model.inner * model.layers, 0),
            ]
        memory = self.state + self.activations(access.vaccine.batch_size * longest, lora=False)
        stored = members * model.blocks * 2  # changes in 16 bits
        return [
            Cost("variants", 1, memory, None, None, stored, 6 * model.parameters * seen),
            Cost("scores", 1, (members + 2) * model.inner * model.hidden * 4, None, None, 0, 0),
        ]
