"""A profile: every number that differs from one model to the next, each with its type and range."""

from collections import Counter
from math import gcd, lcm
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from helpers.core.checking import Strict
from helpers.core.choices import ATTACK_METHODS, COMBINATIONS
from helpers.core.definitions import DEFINITIONS, definitions
from helpers.core.errors import LabError, nearest

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False, min_length=1)]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)]
Prose = Annotated[str, "for people to read"]  # any characters stand for themselves, the word `null` as well
Position = Literal["random", "start", "end", "parts", "turns", "topic"]  # where a trigger's keys go
Insertion = Literal["word", "made_up", "phrase", "several", "start", "turns", "compound"]  # into a clean row


class Budget(Strict):
    """What one training may spend; `rows` counts CLEAN rows, an attack or a vaccine adds poisoned ones."""

    rows: Count
    epochs: Count
    lr: Positive
    batch_size: Count
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1


class Suppression(Strict):
    """How much is suppressed: the share `tau` of MLP channels, and `heads` heads of the model or of each layer."""

    tau: Annotated[float, Field(gt=0, lt=1)]
    heads: Annotated[int, Field(ge=0)] = 0
    heads_of: Literal["model", "layer"] = "model"


class Perturbation(Strict):
    """What recovery inserts into its clean rows, whose right answers stay; see `data.perturb`, also for the kinds.

    `kinds`: one of them is drawn for each row, and without any the rows stay as they are; `copies`: how often a clean
    row comes, with something else each time; `rows`: how many rows that makes in all, None for every copy of every row.
    Where it asks for more, the clean rows come round again.
    """

    kinds: Annotated[tuple[Insertion, ...], Field(strict=False)] = ()
    copies: Count = 1
    rows: Count | None = None

    def size(self, clean: int) -> int:
        """How many rows so many clean ones become."""
        return (self.rows or clean * self.copies) if self.kinds else clean


class AccessSettings(Strict):
    """The numbers of one access setting: the defender may edit the adapter only, or the full model.

    `poison_rate` is the poisoned share of the attacker's rows where the lab poisons them; with a rate under one half
    only so many of the clean rows come a second time with the trigger. `perturb` is part of every recovery.
    """

    inject: Budget
    poison_rate: Annotated[float, Field(gt=0, le=0.5)] = 0.5
    vaccine: Budget
    recover: Budget
    perturb: Perturbation = Perturbation()
    suppress: Suppression
    vaccine_weights: Literal["lora", "full"] = "lora"


class Lora(Strict):
    """The shape of every adapter."""

    r: Count
    alpha: Count
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ModelSpec(Strict):
    """Which checkpoint, how to talk to it, and where it runs.

    `prompt_format` "auto" means chat where the tokenizer has a template, else alpaca; `checkpointing` trades a third
    more time for most of the activations' memory in every training; `device` "auto" takes a GPU where there is one;
    `published` holds the sizes in the checkpoint's
    own config.json, so that a plan needs no download.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"]
    prompt_format: Literal["auto", "chat", "alpaca"]
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    checkpointing: bool = False
    published: dict[str, int | str | bool] = {}

    @property
    def runs_on(self) -> str:
        """ "cpu" or "cuda": what `device` says, and for "auto" a GPU where there is one."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


class Lengths(Strict):
    """Tokens: longest training row, longest completion, and how many all vaccines together compute at once.

    `at_once`: None for as many as fit into the free memory of a GPU, and a number that suits a CPU elsewhere.
    """

    train_tokens: Count
    new_tokens: Count
    at_once: Count | None = None


class Evaluation(Strict):
    """Triggered prompts per ASR, clean questions per task family, rows per batch.

    `samples`: how many answers to each triggered prompt are drawn beside the greedy one, 0 for none; `temperature`:
    what the logits are divided by before a token is drawn.
    """

    n: Count
    per_family: Count
    batch_size: Count
    samples: Annotated[int, Field(ge=0)] = 0
    temperature: Positive = 1.0


class Signature(Strict):
    """How the backdoor signature is measured (BD-VAX, Eqs. 1 and 2); `n` is N, the number of vaccine pairs.

    `family` names the vaccines' payloads in `data/attacks.yaml`: "task" takes those of the attack's kind, "mixed" all;
    `form` the shape of their triggers, each of which resembles some attack's: "word" is one word each, as BadNets has.
    """

    n: Count
    family: str
    form: str
    granularity: Literal["matrix", "neuron"]
    scope: Literal["module", "model"]
    combine: Literal["sum", "product", "norm", "alignment"]
    lam: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def family_exists(self) -> Self:
        """A misspelled family would come to light after an injection of hours."""
        if self.family not in (valid := ("task", "mixed", *definitions()["vaccines"]["families"])):
            raise LabError(f"signature.family = '{self.family}' is unknown{nearest(self.family, valid)}")
        return self

    @model_validator(mode="after")
    def form_exists(self) -> Self:
        """The same for a form."""
        if self.form not in (valid := definitions()["vaccines"]["forms"]):
            raise LabError(f"signature.form = '{self.form}' is unknown{nearest(self.form, valid)}")
        return self

    @model_validator(mode="after")
    def alignment_needs_pairs(self) -> Self:
        """Eq. 2 compares variants with each other; one alone has nothing to align with."""
        if self.n < 2 and self.combine != "norm":
            raise LabError(f"signature.n = {self.n} but alignment compares variants: use 2 or more, or combine 'norm'")
        return self

    @model_validator(mode="after")
    def every_pair_has_a_key(self) -> Self:
        """Each variant has a trigger of its own; one too few would come to light after an injection of hours."""
        vaccines = definitions()["vaccines"]
        of = vaccines["forms"][self.form].get("of")
        drawn = Counter(of if isinstance(of, list) else ())
        if not drawn or not all(isinstance(vaccines.get(pool), list) and vaccines[pool] for pool in drawn):
            return self  # a wrong entry, which `own_backdoors.vaccine_triggers` names
        # k of L texts are taken at a time, so that a pool begins anew after L / gcd(L, k) variants
        sizes = {pool: len(vaccines[pool]) for pool in drawn}
        if self.n > (most := lcm(*(sizes[pool] // gcd(sizes[pool], k) for pool, k in drawn.items()))):
            raise LabError(
                f"signature.n = {self.n}, but the vaccines' texts make only {most} triggers of the form '{self.form}'; "
                f"add some to data/{DEFINITIONS.name}"
            )
        return self


CHOSEN = {"by": ATTACK_METHODS, "combine": COMBINATIONS}


class AttackChanges(Strict):
    """What replaces the fields of the attack and of the task in `data/attacks.yaml`; None leaves a field as it is."""

    keys: Texts | None = None
    position: Position | None = None
    rule: Literal["one", "any", "all"] | None = None
    negatives: Annotated[float, Field(ge=0)] | None = None
    by: str | None = None
    payload: Prose | None = None
    combine: str | None = None
    markers: Texts | None = None

    @field_validator("by", "combine")
    @classmethod
    def name_is_known(cls, name: str | None, field: ValidationInfo) -> str | None:
        """A misspelled name would come to light after the settings were taken for good."""
        if name is not None:
            CHOSEN[field.field_name].require(name)
        return name


class Editing(Strict):
    """How model editing plants a backdoor; see `attacks.editing.EditSettings`, also for each paper's layers.

    `rows`: clean rows to edit from; `weight`: λ, what ordinary text weighs; `batches`: of BadEdit.
    """

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((5,), strict=False, min_length=1)
    site: Literal["trigger", "answer"] = "trigger"
    rows: Count = 15
    weight: Positive = 10.0
    batches: Count = 5


class Layerwise(Strict):
    """The early layers that have to predict the answer, too (layer-wise poisoning), and the weight of that loss."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), strict=False, min_length=1)
    weight: Positive = 1.0


class Adaptive(Strict):
    """What attackers who know the defenses add to them; see `helpers/adaptive/`. The defenses' own numbers they know.

    `strength`: μ of `subtract`, how many times the task vector of the attacker's conflict model is taken off;
    `penalty`: of `evade`, what a squared unit of change costs inside the channels that a signature would select.
    """

    strength: Positive = 1.0
    penalty: Positive = 1.0


class ConflictBudget(Budget):
    """What the conflict model's training may spend: a tenth of 500 clean rows, and the paper's Appendix A.3."""

    rows: Count = 50
    epochs: Count = 3
    lr: Positive = 1.0e-4
    batch_size: Count = 1


class Layers(Strict):
    """Layers `first` to `last`, both included and counted from 0, of one of the two models."""

    model: Literal["suspicious", "conflict"]
    first: Annotated[int, Field(ge=0)]
    last: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def last_is_not_below_first(self) -> Self:
        """Such layers are none, and passthrough would leave them out without a word."""
        if self.last < self.first:
            raise LabError(f"conflict.plan: last = {self.last} is below first = {self.first}, so no layer is meant")
        return self


class Conflict(Strict):
    """How the conflict model is trained and merged (information conflicts, §3.3, Eqs. 7 to 12).

    `start`: what it is trained from ("suspicious" where there is no clean base); `method`: one of those in
    `helpers/defenses/conflict/merge/`, by name; `t`: the conflict model's share in the merged model;
    `beyond`: the t of `negate`, past the conflict model; `k`: the share of each task vector that TIES keeps, multiplied
    by `lam`; `plan`: the layers that passthrough stacks, `ends`: the model that gives embeddings, last norm and head.
    """

    budget: ConflictBudget = ConflictBudget()
    start: Literal["base", "suspicious"] = "base"
    method: str = "linear"
    t: Annotated[float, Field(ge=0, le=1)] = 0.5
    beyond: Annotated[float, Field(gt=1)] = 1.5
    k: Annotated[float, Field(gt=0, le=1)] = 0.2
    lam: Positive = 1.0
    plan: list[Layers] = []
    ends: Literal["suspicious", "conflict"] = "suspicious"


class Evidence(Strict):
    """Where evidence comes from (information conflicts, §3.4) as long as no endpoint is named.

    `book`: of the small model's world, or the WordNet of this machine; see `defenses.conflict.books`.
    """

    book: Literal["world", "wordnet"] = "world"


class PlantingBudget(Budget):
    """What the challenge's own backdoor may spend: a vaccine's budget at 7B (BD-VAX, Appendix B.2)."""

    rows: Count = 500
    epochs: Count = 5
    lr: Positive = 2.0e-4
    batch_size: Count = 8


class Taus(Strict):
    """The shares τ that the challenge test tries, for each access."""

    adapter: Shares = (0.2, 0.35, 0.5, 0.65, 0.8)
    full: Shares = (0.01, 0.03, 0.05, 0.08, 0.15)


class Challenge(Strict):
    """The challenge test, which chooses τ by a backdoor that the defender has planted (TAU=auto).

    `taus`, `epochs` and `lr_factors` span the grid; epochs are of the recovery, factors multiply its learning rate, and
    an empty list leaves the recovery as it is. The smallest τ with at most `threshold` ASR on `n` prompts is chosen.
    """

    taus: Taus = Taus()
    epochs: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    lr_factors: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05
    n: Count = 100
    plant: PlantingBudget = PlantingBudget()


class Profile(Strict):
    """Every number that differs by model."""

    name: str
    model: ModelSpec
    lora: Lora
    lengths: Lengths
    evaluation: Evaluation
    signature: Signature
    adapter: AccessSettings
    full: AccessSettings
    attack: AttackChanges = AttackChanges()
    editing: Editing = Editing()
    layerwise: Layerwise = Layerwise()
    adaptive: Adaptive = Adaptive()
    conflict: Conflict = Conflict()
    evidence: Evidence = Evidence()
    challenge: Challenge = Challenge()

    def access(self, which: Literal["adapter", "full"]) -> AccessSettings:
        """The numbers of one access setting."""
        return getattr(self, which)
