"""What a run will cost, told before it starts: memory, disk, arithmetic and time of every stage.

Only the checkpoint's config is read; the model is built without storage. What no config tells is measured here in
seconds (what the libraries take, how fast this machine multiplies, how long the rows are) or named as an assumption.
"""

import functools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from helpers.core.profile import Access, Budget, ModelSpec, Profile
from helpers.core.settings import AUTO, Settings
from helpers.data import corpus
from helpers.data.example import Example
from helpers.defenses.bdvax.challenge import grid
from helpers.model.architecture import attention_slots, matrices, mlp_slots, parameter_shapes, positions
from helpers.model.batches import encode_rows
from helpers.model.checkpoint import check_checkpoint, is_local, load_config
from helpers.model.lora import new_adapter
from helpers.model.shards import SHARD_SIZE
from helpers.model.tokenizer import has_tokenizer, load_format
from helpers.run.deal import deal
from helpers.run.limits import check_against_model
from helpers.train.finetune import finetune
from helpers.train.precision import STORING_LOSS

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # 64 weights share an 8-bit scale, 256 scales a 32-bit one
TRAINED = 16  # bytes for each trained number: value, gradient, two moments, all in 32 bits
STACKED = 20  # of adapters that train together: the gradient of a part stands beside the sum of all parts
# What the allocator holds at the peak, as a multiple of what autograd keeps. On a CPU measured on the small model: the
# C library's heap does not give back the copies that a LoRA layer makes of its output. On a GPU measured at the shape
# of LLaMA-2-7B (benchmarks/results/gpu.json).
HEAP = {("cpu", "lora"): 2.1, ("cpu", "full"): 1.15, ("cuda", "lora"): 1.05, ("cuda", "full"): 1.05}
CUDA_CONTEXT = 600e6  # bytes of a GPU that a process takes before its first tensor (assumed)
UTILISATION = {"cpu": 0.5, "cuda": 0.35}  # share of the machine's multiplication speed that these stages reach
TAU_POINTS = 4  # further points of notebook 06's curve, each a suppression and a recovery
MERGED_POINTS = 14  # merges that notebook 07 measures
CONFLICT_REPORTS = 21  # evaluations of notebooks 07 to 09
WHOLE_MODELS = 6  # those that they keep
ROOM = 0.95  # share of the free memory that a stage may fill
REMEDIES = ("model.checkpointing=true", "lengths.at_once=1024", "{access}.inject.batch_size=1")
REMEDIES += ("{access}.recover.batch_size=1", "evaluation.batch_size=4", "model.dtype=bfloat16")


@dataclass(frozen=True)
class Shape:
    """A checkpoint in numbers; `blocks` counts the weights of the layers' matrices, the ones that 4 bits can hold."""

    parameters: int
    blocks: int
    hidden: int
    inner: int
    query: int
    cached: int  # keys and values of one token in one layer
    layers: int
    heads: int
    vocabulary: int
    adapter: int  # numbers of one LoRA adapter on all linear layers

    def weights(self, dtype: str, four_bit: bool = False) -> float:
        """Bytes of all weights; in 4 bits the embeddings, norms and head stay in `dtype`."""
        rest = (self.parameters - self.blocks) * BYTES[dtype]
        return rest + self.blocks * (NF4_BYTES if four_bit else BYTES[dtype])


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


@dataclass(frozen=True)
class Machine:
    """What is here; `free` and `libraries` in bytes, `speed` in FLOPs per second, both None where there is no GPU."""

    name: str
    free: float | None
    speed: float | None
    libraries: float


def known_config(spec: ModelSpec) -> PretrainedConfig:
    """A model's config without a download: of a model that is not here yet, one with the sizes that are published.

    Raises: LabError for a config that cannot be read.
    """
    if is_local(spec) or not spec.published:
        return load_config(spec)
    config = AutoConfig.for_model(**spec.published)
    if positions(config) is None and "max_position_embeddings" not in spec.published:
        config.max_position_embeddings = sys.maxsize  # the architecture's default says nothing of this model
    return config


def shape(profile: Profile) -> Shape:
    """Count a checkpoint's weights from its config alone.

    Raises: LabError for an architecture that the lab does not know, a config that cannot be read, or a checkpoint on
        this machine that no stage could use.
    """
    config = known_config(profile.model)
    shapes, modules = parameter_shapes(config), matrices(config)
    check_checkpoint(profile.model, shapes)
    sizes = {module: shapes[f"{module}.weight"] for module in modules}
    inner, (query, key, *_) = mlp_slots(config)[0][0], attention_slots(config)[0]
    return Shape(
        parameters=sum(map(math.prod, shapes.values())),
        blocks=sum(map(math.prod, sizes.values())),
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

    Raises: LabError for a tokenizer or a chat template that is here and cannot be used.
    """
    limit = settings.profile.lengths.train_tokens
    if not has_tokenizer(settings.profile.model):  # a plan downloads nothing
        return Rows(limit / 4, limit, limit / 8, counted=False)
    prompt_format = load_format(settings.profile.model)
    attack = deal(settings.config()).attack
    encoded = encode_rows(attack.clean + attack.poisoned, prompt_format, limit)
    lengths = [len(row["input_ids"]) for row in encoded]
    answers = sum(token != -100 for row in encoded for token in row["labels"])
    return Rows(sum(lengths) / len(encoded), max(lengths), answers / len(encoded), counted=True)


def costs(settings: Settings, model: Shape, row: Rows) -> list[Cost]:
    """The stages of a run in order.

    Training keeps of each token and Llama block 4 inner + 6 hidden + 4 query numbers for the backward pass (two hidden
    fewer, seven ranks more when a LoRA adapter trains), with checkpointing one block of them and each block's input.
    Arithmetic: 6 FLOPs per weight and token to train all weights, 4 to train an adapter over them, 2 to read.
    """
    run = _Run(settings, model, row)
    access, conflict = settings.profile.access(settings.ACCESS), settings.profile.conflict.budget
    recovered = run.healed + TAU_POINTS + run.tried
    return [
        *run.injection(settings.planted_by, access),
        run.evaluation(2 + run.cuts + recovered + CONFLICT_REPORTS),
        *run.vaccines(access),
        *run.challenge(),
        Cost("suppress", run.cuts, run.suppressing, None, None, run.cuts * run.suspicious, 0),
        run.training("recover", recovered, access.recover, access.recover.rows, kept=run.healed),
        run.training("conflict model", 2, conflict, conflict.rows, lora=True),
        Cost("merge", MERGED_POINTS, run.one_file, None, None, WHOLE_MODELS * max(run.whole, run.suspicious), 0),
    ]


class _Run:
    """The sizes of one run, and what each kind of stage costs at them."""

    def __init__(self, settings: Settings, model: Shape, row: Rows):
        self.profile, self.model, self.row = settings.profile, model, row
        self.by_adapter = settings.ACCESS == "adapter"
        self.number = BYTES[self.profile.model.dtype]
        self.whole, self.members = model.parameters * self.number, 2 * self.profile.signature.n
        # weights that train are held in 32 bits, and stored so where 16 would lose too much of what they learned
        self.masters = not self.by_adapter and self.number < 4
        self.trained = model.parameters * 4
        self.suspicious = model.adapter * 4 if self.by_adapter else self.trained if self.masters else self.whole
        self.one_file = 2 * min(self.whole, SHARD_SIZE)  # as it was read and as it is written
        self.suppressing = self.suspicious if self.by_adapter else self.one_file
        self.cuts, self.healed = 4, 5  # the signature and three controls; healed, fine-tuning alone beside them
        # the challenge test cures its own copy and, to be judged, the suspicious model at every point
        self.tried = 2 * len(grid(self.profile, settings.ACCESS)) if settings.TAU == AUTO else 0

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
        self, stage: str, times: int, budget: Budget, count: float, kept: int = 1, lora: bool | None = None
    ) -> Cost:
        """Training on so many rows, repeated `times`; `kept` of the results stay on the disk.

        Args: lora, whether an adapter trains; by default where the access setting says so.
        """
        tokens, model = times * count * budget.epochs * self.row.mean, self.model
        lora = self.by_adapter if lora is None else lora
        held = self.activations(budget.batch_size * self.row.longest, lora)
        if lora:
            other = model.adapter * TRAINED + held
            return self.based(stage, times, other, kept * model.adapter * 4, 4 * model.parameters * tokens)
        return Cost(stage, times, self.state + held, None, None, kept * self.suspicious, 6 * model.parameters * tokens)

    def injection(self, by: str, access: Access) -> list[Cost]:
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

    def evaluation(self, times: int) -> Cost:
        """Answers to the triggered prompts and the clean questions."""
        model, row, sizes = self.model, self.row, self.profile.evaluation
        width = sizes.batch_size * (row.longest + self.profile.lengths.new_tokens)
        heap = HEAP[self.profile.model.runs_on, "full"]
        other = heap * self.number * width * (model.layers * model.cached + 4 * model.inner)
        other += self.suspicious if self.by_adapter else self.suspicious - self.whole
        rows = sizes.n + sizes.per_family * len(corpus.FAMILIES)
        return self.based("evaluate", times, other, 0, times * rows * 2 * model.parameters * (row.mean + row.answer))

    def vaccines(self, access: Access) -> list[Cost]:
        """Training the 2N variants, all at once as adapters or one after the other in full, and scoring them."""
        model, members, longest = self.model, self.members, self.row.longest
        seen = 1.5 * members * access.vaccine.rows * access.vaccine.epochs * self.row.mean
        if self.by_adapter or access.vaccine_weights == "lora":
            at_once = max(self.profile.lengths.at_once, members * longest)
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


def this_machine(settings: Settings) -> Machine:
    """Free memory and speed of the device that the profile asks for; takes a second or two."""
    device, dtype = settings.profile.model.runs_on, getattr(torch, settings.profile.model.dtype)
    if device == "cuda":
        if not torch.cuda.is_available():
            return Machine("no GPU here", None, None, CUDA_CONTEXT)
        free = torch.cuda.mem_get_info()[0]
        return Machine(torch.cuda.get_device_name(), free, _speed(device, dtype), CUDA_CONTEXT)
    libraries = _libraries(settings.profile)
    free = psutil.virtual_memory().available + libraries
    return Machine(f"{torch.get_num_threads()} CPU cores", free, _speed(device, dtype), libraries)


def fits(cost: Cost, machine: Machine) -> bool:
    """Whether a stage stays inside the free memory."""
    return machine.free is not None and machine.libraries + cost.memory <= ROOM * machine.free


def remedy(settings: Settings, machine: Machine, model: Shape, row: Rows) -> str:
    """The first settings, taken together in the order of `REMEDIES`, under which every stage fits; "" for none."""
    if machine.free is None:
        return ""
    chosen: dict[str, Any] = {}
    for text in REMEDIES:
        key, _, value = text.format(access=settings.ACCESS).partition("=")
        chosen[key] = {"true": True}.get(value, int(value) if value.isdigit() else value)
        changed = Settings.checked(settings.model_dump() | {"OVERRIDES": settings.OVERRIDES | chosen})
        if all(fits(cost, machine) for cost in costs(changed, model, row)):
            return " ".join(f"{key}={str(value).lower()}" for key, value in chosen.items())
    return ""


def report(settings: Settings) -> Iterator[str]:
    """The plan as lines of text.

    Raises: LabError as `shape` and `rows`, or for settings that the model cannot follow, see `check_against_model`.
    """
    profile, model = settings.profile, shape(settings.profile)
    check_against_model(settings, known_config(profile.model))
    row = rows(settings)
    machine, access = this_machine(settings), settings.profile.access(settings.ACCESS)
    cut = access.suppress.heads * (model.layers if access.suppress.heads_of == "layer" else 1)
    half, quarter = _size(model.weights("bfloat16")), _size(model.weights("bfloat16", four_bit=True))
    yield (
        f"{profile.name}, {settings.ACCESS} access: {model.parameters / 1e6:,.1f} million weights, "
        f"{model.layers} layers; {half} in 16 bits, {quarter} in 4"
    )
    yield (
        f"one adapter: {model.adapter / 1e6:,.2f} million numbers, {_size(4 * model.adapter)}; to cut: "
        f"{round(access.suppress.tau * model.inner):,} of {model.inner:,} channels in each layer"
        + (f", {cut} of {model.layers * model.heads} heads" if cut else "")
    )
    if settings.ACCESS == "full" and profile.model.dtype != "float32":
        yield (
            f"all weights train in 32 bits, {_size(TRAINED * model.parameters)} with gradient and moments; the model "
            f"is stored in {_size(4 * model.parameters)} where 16 bits would lose over {STORING_LOSS:.0%} of the change"
        )
    source = "counted" if row.counted else "assumed, the tokenizer is not here"
    yield f"rows: {row.mean:.0f} tokens in the mean, at most {row.longest:.0f} ({source})"
    free = "" if machine.free is None else f", {_size(machine.free)} free, {machine.speed / 1e9:,.0f} GFLOP/s"
    yield f"machine: {machine.name}{free}; the libraries themselves take {_size(machine.libraries)}"
    yield ""
    head = ("stage", "times", "peak memory", "base 16-bit", "base 4-bit", "disk", "TFLOP", "time", "")
    planned = costs(settings, model, row)
    lines = [head, *(_line(cost, machine, profile.model.runs_on) for cost in planned)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for stage, *numbers in lines:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        yield "  ".join([stage.ljust(widths[0]), *cells]).rstrip()
    yield ""
    yield verdict(settings, planned, machine, model, row)


def verdict(settings: Settings, planned: Sequence[Cost], machine: Machine, model: Shape, row: Rows) -> str:
    """One line: it fits, or what to try."""
    peak = machine.libraries + max(cost.memory for cost in planned)
    disk = f"disk: {_size(sum(cost.disk for cost in planned))}"
    if machine.free is None:
        return f"does not fit: no GPU here; a card with {math.ceil(peak / ROOM / 1e9)} GB would do; {disk}"
    if all(fits(cost, machine) for cost in planned):
        return f"fits: at most {_size(peak)} of {_size(machine.free)}; {disk}"
    if found := remedy(settings, machine, model, row):
        return f'does not fit: {_size(peak)} of {_size(machine.free)}; try SET="{found}"'
    other = "ACCESS=adapter, or " if settings.ACCESS == "full" else ""
    return f"does not fit: {_size(peak)} of {_size(machine.free)}; try {other}a smaller model or a larger machine"


def _line(cost: Cost, machine: Machine, device: str) -> tuple[str, ...]:
    memory = (cost.memory, cost.in_16_bit, cost.in_4_bit)
    seconds = None if machine.speed is None else cost.flops / machine.speed / UTILISATION[device]
    return (
        cost.stage,
        str(cost.times),
        *("–" if size is None else _size(machine.libraries + size) for size in memory),
        _size(cost.disk),
        f"{cost.flops / 1e12:,.2f}",
        "–" if seconds is None else _duration(seconds),
        "" if machine.free is None else "fits" if fits(cost, machine) else "DOES NOT FIT",
    )


@functools.cache
def _speed(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product."""
    side = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the GPU
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _libraries(profile: Profile) -> float:
    """What a notebook's kernel takes that trains a model of no size."""
    import ipykernel.ipkernel  # noqa: F401
    import pandas  # noqa: F401

    from helpers import plots  # noqa: F401

    prompt_format = load_format(profile.model)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(prompt_format.tokenizer), **sizes))
    examples = [Example("Say yes.", "yes")] * 4
    finetune(new_adapter(model, profile.lora, 0), examples, prompt_format, profile.adapter.recover, 0, 64)
    return float(psutil.Process().memory_info().rss)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
