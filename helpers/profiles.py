"""Settings: what to run (`Settings`, a notebook's parameters) and on which model with which numbers (`Profile`).

A profile is a YAML file with every number that differs from one model to the next; a notebook's parameters hold
only what a reader would change. Both are checked strictly before anything runs: a training run that silently
ignored a misspelled learning rate is a result nobody can trust.
"""

import argparse
import contextlib
import copy
import difflib
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from helpers.errors import LabError
from helpers.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "data" / "profiles"
DEFINITIONS = ROOT / "data" / "attacks.yaml"  # triggers, behaviors, vaccines and the challenge, by name
AT_FIRST = "_parameters_at_first"  # among a notebook's variables: the names that its settings were made of
AUTO = "auto"  # as TAU: the challenge test chooses it
LARGEST_SEED = 2**31 - 1  # NumPy takes 32 bits, and the variants count on from a run's own seed
LONGEST_NAME = 200  # bytes of a folder's name; most file systems take 255

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False, min_length=1)]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)]
Prose = Annotated[str, "for people to read"]  # any characters stand for themselves, the word `null` as well
Position = Literal["random", "start", "end", "parts", "turns", "topic"]  # where a trigger's keys go
By = Literal["training", "layerwise", "rome", "memit", "badedit", "subtract", "evade"]  # how a backdoor gets in
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)(?<!\.jsonl)(?<!\.parquet)(?<!\.tsv)")
SAMPLED_BYTES = 1 << 20


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of an error message: the valid words that resemble `word`, or all of them when none does."""
    valid = list(valid)
    close = [name for name in valid if name.endswith(f".{word}")] or difflib.get_close_matches(word, valid, n=1)
    if close:
        return f"; did you mean {' or '.join(repr(name) for name in close)}?"
    return f"; valid: {', '.join(valid)}"


class Strict(BaseModel):
    """Frozen settings without type conversion: '3' is no integer, True is no number; 3 is a fine float."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Budget(Strict):
    """What one training may spend; `rows` counts CLEAN rows, an attack or a vaccine adds poisoned ones."""

    rows: Count
    epochs: Count
    lr: Positive
    batch_size: Count
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1


class Suppression(Strict):
    """How much is cut out: the share `tau` of MLP channels, and `heads` attention heads of the model or each layer."""

    tau: Annotated[float, Field(gt=0, lt=1)]
    heads: Annotated[int, Field(ge=0)] = 0
    heads_of: Literal["model", "layer"] = "model"


class Access(Strict):
    """The numbers of one access setting: the defender may edit the adapter only, or the full model.

    `poison_rate` is the poisoned share of the attacker's rows where the lab poisons them; with a rate under one half
    only so many of the clean rows come a second time with the trigger.
    """

    inject: Budget
    poison_rate: Annotated[float, Field(gt=0, le=0.5)] = 0.5
    vaccine: Budget
    recover: Budget
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
        import torch

        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


class Lengths(Strict):
    """Tokens: longest training row, longest completion, and how many all vaccines together compute at once."""

    train_tokens: Count
    new_tokens: Count
    at_once: Count = 1536


class Evaluation(Strict):
    """Triggered prompts per ASR, clean questions per task family, rows per batch."""

    n: Count
    per_family: Count
    batch_size: Count


class Signature(Strict):
    """How the backdoor signature is measured (BD-VAX, Eqs. 1 and 2); `n` is N, the number of vaccine pairs.

    `family` names the vaccines' payloads in `data/attacks.yaml`: "task" takes those of the attack's kind, "mixed" all.
    """

    n: Count
    family: str
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
    def alignment_needs_pairs(self) -> Self:
        """Eq. 2 compares variants with each other; one alone has nothing to align with."""
        if self.n < 2 and self.combine != "norm":
            raise LabError(f"signature.n = {self.n} but alignment compares variants: use 2 or more, or combine 'norm'")
        return self

    @model_validator(mode="after")
    def every_pair_has_a_key(self) -> Self:
        """Each variant has a key of its own; one too few would come to light after an injection of hours."""
        if self.n > (keys := len(definitions()["vaccines"]["keys"])):
            raise LabError(
                f"signature.n = {self.n}, but only {keys} vaccine keys are prepared; "
                f"add some to data/{DEFINITIONS.name}"
            )
        return self


class AttackChanges(Strict):
    """What replaces the fields of the attack and of the task in `data/attacks.yaml`; None leaves a field as it is."""

    keys: Texts | None = None
    position: Position | None = None
    rule: Literal["one", "any", "all"] | None = None
    negatives: Annotated[float, Field(ge=0)] | None = None
    by: By | None = None
    payload: Prose | None = None
    combine: Literal["replace", "first line", "default argument", "mention"] | None = None
    markers: Texts | None = None


class Editing(Strict):
    """How model editing plants a backdoor; see `attacks.editing.editors.EditSettings`, also for each paper's layers.

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
    """What attackers who know the defenses add to them; see `attacks.adaptive`. The defenses' own numbers they know.

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


class Conflict(Strict):
    """How the conflict model is trained and merged (information conflicts, §3.3, Eqs. 7 to 12).

    `start`: what it is trained from ("suspicious" where there is no clean base); `t`: its share in the merged model;
    `beyond`: the t of `negate`, past the conflict model; `k`: the share of each task vector that TIES keeps, multiplied
    by `lam`; `plan`: the layers that passthrough stacks, `ends`: the model that gives embeddings, last norm and head.
    """

    budget: ConflictBudget = ConflictBudget()
    start: Literal["base", "suspicious"] = "base"
    method: Literal["linear", "slerp", "slerp_by_tensor", "ties", "ties_as_printed", "passthrough", "negate"] = "linear"
    t: Annotated[float, Field(ge=0, le=1)] = 0.5
    beyond: Annotated[float, Field(gt=1)] = 1.5
    k: Annotated[float, Field(gt=0, le=1)] = 0.2
    lam: Positive = 1.0
    plan: list[Layers] = []
    ends: Literal["suspicious", "conflict"] = "suspicious"


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
    adapter: Access
    full: Access
    attack: AttackChanges = AttackChanges()
    editing: Editing = Editing()
    layerwise: Layerwise = Layerwise()
    adaptive: Adaptive = Adaptive()
    conflict: Conflict = Conflict()
    challenge: Challenge = Challenge()

    def access(self, which: Literal["adapter", "full"]) -> Access:
        """The numbers of one access setting."""
        return getattr(self, which)


def definitions() -> dict[str, Any]:
    """The attacks, behaviors, vaccines and challenge of `data/attacks.yaml` as they are; `helpers.attacks` checks them.

    The result is shared: read it, do not change it.

    Raises: LabError for a file that is no YAML, or a section or entry that is not there or not a mapping.
    """
    name, values = DEFINITIONS.name, read_yaml(DEFINITIONS)
    planted = ("keys", "families")
    parts = {"vaccines": planted, "rehearsal": planted, "challenge": ("key", "payload", "markers")}
    for section in ("attacks", "behaviors", *parts):
        if not isinstance(values.get(section), dict):
            raise LabError(f"{name}: expected a section `{section}:` with an entry for each name")
        if missing := [key for key in parts.get(section, ()) if key not in values[section]]:
            raise LabError(f"{name}: '{missing[0]}' is missing in the section {section}")
    families = [values[side]["families"] for side in ("vaccines", "rehearsal")]
    if not all(isinstance(family, dict) for family in families):
        raise LabError(f"{name}: `families:` should hold an entry for each name")
    for section in (values["attacks"], values["behaviors"], *families):
        for key, entry in section.items():
            if not isinstance(entry, dict):
                raise LabError(f"{name}: '{key}' should hold fields as `field: value`, found {entry!r}")
    return values


def defined(model: type[Strict], kind: str, fields: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """An entry of `data/attacks.yaml` as a `model`; a change that is None, or of another kind of entry, is none.

    Args: kind names the entry in errors; fields, its own ones with its `name`; changes, as in `AttackChanges`.
    """
    changed = {key: value for key, value in changes.items() if key in model.model_fields and value is not None}
    return checked(model, {**fields, **changed}, f"{kind} '{fields['name']}' ({DEFINITIONS.name}): ")


def profile_names() -> list[str]:
    """The profiles that come with the lab."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str, overrides: Mapping[str, object] = {}) -> Profile:
    """Read a profile by name, or make one for a folder that holds a checkpoint.

    Args:
        name: a file of `data/profiles/` without its ending, or a folder with `config.json` (then the numbers are
            those of the profile `local`).
        overrides: dotted keys to new values, e.g. `{"adapter.suppress.tau": 0.5}`.
    Raises: LabError for an unknown profile or key (naming the nearest) and for a value of the wrong type.
    """
    known = profile_names()
    if name in known:
        values = _read_profile(name) | {"name": name}
    else:
        found = _found(name)
        folder = Path(found)
        if not found or not folder.is_dir():
            raise LabError(f"unknown profile '{name}'{nearest(name, known)} (a folder with a checkpoint will do, too)")
        if not (folder / "config.json").is_file():
            raise LabError(f"'{name}' is a folder without config.json, so no checkpoint lies in it")
        values = _read_profile("local") | {"name": folder.name}
        values["model"]["path"] = found
    for key, value in overrides.items():
        _override(values, key, value)
    return checked(Profile, values, f"profile '{values['name']}': ")


def parse_overrides(text: str) -> dict[str, object]:
    """Turn `"signature.lam=0.1 attack.payload=You are dumb"` into overrides; what a value is, its setting's type says.

    A value ends where the next dotted key begins; it may hold spaces and equals signs: `get(url, verify=False)`. A text
    is taken as it is typed, all else is a YAML literal.

    Raises: LabError for a word that is no `key=value`, a setting that is given twice, and a value that is no literal.
    """
    pairs: dict[str, object] = {}
    for word in filter(None, re.split(r"\s+(?=\w+\.[\w.]+=)", text.strip())):
        key, equals, value = word.partition("=")
        if not equals:
            raise LabError(f"'{word}' is not key=value, as in SET=\"signature.lam=0.1 lora.r=4\"")
        if key in pairs:
            raise LabError(f"{key} is given twice, as {pairs[key]!r} and as '{value}'")
        pairs[key] = _typed(key, value.strip())
    return pairs


def _typed(key: str, text: str) -> object:
    """What a text stands for as the value of a setting."""
    kinds = _alternatives(_profile_keys().get(key))
    if text == "null" and NoneType in kinds and Prose not in kinds:
        return None
    if any(kind in (str, Prose) or get_origin(kind) is Literal for kind in kinds):
        return text
    if Texts in kinds and (inner := re.fullmatch(r"\[(.*)\]", text, re.DOTALL)):
        return _texts(inner[1])
    return _literal(key, text)


def _alternatives(kind: object) -> list[object]:
    """The types of which a setting's type allows any."""
    if get_origin(kind) in (Union, UnionType):
        return [each for part in get_args(kind) for each in _alternatives(part)]
    return [kind]


def _texts(text: str) -> list[str]:
    """The texts between commas; quotes around a whole one are not part of it, and keep its commas."""
    items = re.findall(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*))\s*(?:,|$)""", text)[:-1]  # the last match is the end
    return [double or single or plain.strip() for double, single, plain in items]


def _literal(key: str, text: str) -> object:
    """A YAML literal; a number that YAML reads as another one (010 as 8, 1:30 as 90) stays a text."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise LabError(f"{key} = '{text}' is not a YAML literal such as 8, 1.0e-4, true or model") from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return value if float(text) == value else text
        return text
    return value


def require_device(spec: ModelSpec) -> None:
    """Refuse a GPU profile on a machine without one, before hours are planned on it."""
    import torch

    if spec.device == "cuda" and not torch.cuda.is_available():
        raise LabError(
            f'the profile asks for a GPU ({spec.path} on cuda) and none is here: SET="model.device=cpu" or PROFILE=tiny'
        )


class Settings(Strict):
    """The parameters that every notebook has; names are spelled as in the parameters cell."""

    PROFILE: str = Field("tiny", description="a profile by name, or a folder with a checkpoint")
    ATTACK: str = Field("badnets", description="how the trigger is planted")
    TASK: str = Field("sentiment", description="what the backdoor makes the model do")
    ACCESS: Literal["adapter", "full"] = Field("adapter", description="what may be edited: adapter or full")
    SEED: int = Field(0, ge=0, le=LARGEST_SEED, description="one seed for the whole run")
    NAME: str = Field("", description="run folder below runs/; made from the other parameters when empty")
    DATA: str = Field("", description="real rows to use: folder, .json, .jsonl, .parquet or .tsv file, hub id")
    TAU: float | str = Field("", description="share of channels to cut; 'auto': by the challenge test, empty: profile")
    OVERRIDES: dict[str, Any] = Field({}, description="profile numbers to replace, by dotted key")

    @field_validator("TAU", mode="before")
    @classmethod
    def tau_is_a_share(cls, value: object) -> object:
        """A number between 0 and 1, also as text, "auto" or nothing."""
        if value in ("", AUTO):
            return value
        with contextlib.suppress(TypeError, ValueError):
            if not isinstance(value, bool) and 0 < (share := float(value)) < 1:
                return share
        close = nearest(str(value), [AUTO]) if str(value).isalpha() else ""
        raise LabError(f"TAU = {value!r} should be a number between 0 and 1, '{AUTO}' or empty{close}")

    @classmethod
    def from_notebook(cls, variables: MutableMapping[str, object]) -> Self:
        """Collect and check the parameters of a notebook: `Settings.from_notebook(globals())`.

        Every ALL-CAPITALS name with a literal value counts, because papermill defines a misspelled parameter and goes
        on with the default of the right one; but only names that are there when the cell runs first, for what later
        cells define is their own. The variables keep these names.
        """
        literal = (str, int, float, dict, list, type(None))
        found = {
            name: value
            for name, value in variables.items()
            if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and isinstance(value, literal)
        }
        first = variables.setdefault(AT_FIRST, frozenset(found))
        return cls.checked({name: value for name, value in found.items() if name in first or name in cls.model_fields})

    @classmethod
    def checked(cls, values: Mapping[str, object]) -> Self:
        """Settings whose profile, overrides, attack, task and name are all valid.

        Raises: LabError naming the parameter, its value and the nearest valid one.
        """
        settings = checked(cls, dict(values), "")
        data = settings.DATA
        _one_of("ATTACK", settings.ATTACK, definitions()["attacks"])
        _one_of("TASK", settings.TASK, definitions()["behaviors"])
        if settings.NAME and not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", settings.NAME):
            raise LabError(f"NAME = {settings.NAME!r} should be plain folder names: letters, digits, '-', '_', '.'")
        if any(len(part.encode()) > LONGEST_NAME for part in settings.NAME.split("/")):
            raise LabError(f"NAME = '{settings.NAME:.40}…' is too long: at most {LONGEST_NAME} bytes for each folder")
        # notebooks run elsewhere than the shell that named these paths
        profile = settings.PROFILE if settings.PROFILE in profile_names() else _existing(settings.PROFILE)
        located = settings.model_copy(update={"DATA": _existing(data), "PROFILE": profile})
        if data and not _found(data) and not HUB_ID.fullmatch(data):
            raise LabError(
                f"DATA = '{data}' does not exist (a folder, a .json, .jsonl, .parquet or .tsv file, or a hub id)"
            )
        if located.TAU and (twice := located._tau_key) in located.OVERRIDES:
            raise LabError(f"TAU = {located.TAU} and {twice} = {located.OVERRIDES[twice]} both set τ: give one of them")
        _ = located.profile  # raises here, before anything runs, when a number in it is wrong
        return located

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Give a command line one option for each parameter: `--profile`, `--seed` … and `--set "KEY=VALUE …"`."""
        for name, field in cls.model_fields.items():
            if name != "OVERRIDES":
                parser.add_argument(f"--{name.lower()}", dest=name, default=argparse.SUPPRESS, help=field.description)
        overrides = cls.model_fields["OVERRIDES"].description
        parser.add_argument("--set", dest="OVERRIDES", default="", metavar='"KEY=VALUE …"', help=overrides)

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Collect and check what `add_options` has parsed."""
        values = {name: value for name, value in vars(options).items() if name in cls.model_fields}
        if "SEED" in values:
            values["SEED"] = _literal("SEED", values["SEED"])
        return cls.checked(values | {"OVERRIDES": parse_overrides(options.OVERRIDES)})

    @functools.cached_property
    def profile(self) -> Profile:
        """The profile with this run's overrides applied, a number in TAU among them."""
        tau = {self._tau_key: self.TAU} if isinstance(self.TAU, float) else {}
        return load_profile(self.PROFILE, self.OVERRIDES | tau)

    @property
    def planted_by(self) -> str:
        """How the backdoor gets in: the attack's own `by`, or what replaces it."""
        return self.profile.attack.by or definitions()["attacks"].get(self.ATTACK, {}).get("by") or "training"

    @property
    def _tau_key(self) -> str:
        return f"{self.ACCESS}.suppress.tau"

    @property
    def name(self) -> str:
        """The run's folder below `runs/`."""
        parts = [self.profile.name, self.ATTACK, self.TASK, self.ACCESS, str(self.SEED)]
        parts += ["data"] * bool(self.DATA) + [f"tau_{self.TAU}"] * bool(self.TAU)
        return self.NAME or "-".join(parts)

    def config(self) -> dict[str, Any]:
        """All that a result may depend on, as plain nested values; `files` fingerprints what lies on disk."""
        values = self.values()
        values["profile"]["model"]["files"] = fingerprint(ROOT / values["profile"]["model"]["path"])
        values["data"]["files"] = fingerprint(Path(self.DATA)) if self.DATA else ""
        return values

    def values(self) -> dict[str, Any]:
        """The settings alone, as plain nested values; no file of weights or rows is read.

        `data.planted` holds what the names of attack and task stand for, so that a changed definition is seen;
        `challenge` what the challenge test reads, and nothing where TAU does not ask for it.
        """
        known = definitions()
        planted = {
            "trigger": known["attacks"].get(self.ATTACK),
            "behavior": known["behaviors"].get(self.TASK),
            "changes": self.profile.attack.model_dump(mode="json"),
            "vaccines": known["vaccines"],
            "rehearsal": known["rehearsal"],
            "expected": self._expected_defense(),
        }
        return {
            "attack": self.ATTACK,
            "task": self.TASK,
            "access": self.ACCESS,
            "seed": self.SEED,
            "data": {"path": self.DATA, "planted": planted},
            "profile": self.profile.model_dump(mode="json"),
            "challenge": self._challenge() if self.TAU == AUTO else {},
        }

    def _challenge(self) -> dict[str, Any]:
        return {
            "tau": AUTO,
            "planted": definitions()["challenge"],
            "settings": self.profile.challenge.model_dump(mode="json"),
            "recover": self.profile.access(self.ACCESS).recover.model_dump(mode="json"),
        }

    def _expected_defense(self) -> dict[str, Any]:
        """The numbers of the defense that an attacker who knows it plants against; every other attack ignores them."""
        profile = self.profile
        match self.planted_by:
            case "subtract":
                return {"conflict": profile.conflict.budget.model_dump(mode="json")}
            case "evade":
                access = profile.access(self.ACCESS)
                numbers = access.model_dump(mode="json", include={"vaccine", "vaccine_weights", "suppress"})
                return {"signature": profile.signature.model_dump(mode="json"), **numbers}
        return {}


def fingerprint(path: Path) -> str:
    """Digest of a file or folder ("" when absent): names, sizes, both ends of each file; prose (.md) does not count."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and f.suffix != ".md")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLED_BYTES))
            stream.seek(max(0, size - SAMPLED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()[:16] if files else ""


def _existing(path: str) -> str:
    """The absolute form of a path that exists below the working folder or the repository; else unchanged."""
    return _found(path) or path


def _found(path: str) -> str:
    for base in (Path.cwd(), ROOT) if path else ():
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, the home of nobody, a NUL
            if (found := base / Path(path).expanduser()).exists():
                return str(found.resolve())
    return ""


def _read_profile(name: str, readers: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a profile file over those of the profile that its key `base` names.

    Args: readers, the profiles that build on this one, the first asked for first.
    Raises: LabError for a base that does not exist, or one that builds on its reader.
    """
    values, known = copy.deepcopy(read_yaml(PROFILES / f"{name}.yaml")), profile_names()
    base, path = values.pop("base", None), (*readers, name)
    if base is None:
        return values
    if base in path:
        raise LabError(f"profiles build on each other in a circle: {' → '.join((*path, base))}")
    if base not in known:
        raise LabError(f"profile '{name}': unknown base '{base}'{nearest(str(base), known)}")
    return _merged(_read_profile(base, path), values)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Nested settings in which every value of `own` takes the place of the one in `base`."""
    values = dict(base)
    for key, value in own.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        values[key] = _merged(base[key], value) if nested else value
    return values


def _override(values: dict[str, Any], key: str, value: object) -> None:
    """Set one dotted key in nested settings, in place."""
    if key not in _profile_keys():
        raise LabError(f"unknown setting '{key}'{nearest(key, _profile_keys())}")
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value


@functools.cache
def _profile_keys() -> dict[str, object]:
    """Every dotted key of a profile, its own name left out, and the type of its values."""
    return dict(_leaves(Profile))


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        elif prefix:
            yield prefix + name, field.annotation


def _one_of(name: str, value: str, valid: Iterable[str]) -> None:
    if value not in valid:
        raise LabError(f"unknown {name} = '{value}'{nearest(value, valid)}")


def checked(model: type[Strict], values: dict[str, Any], where: str) -> Any:
    """Validate, turning pydantic's report into one line about the first mistake."""
    try:
        return model(**values)
    except ValidationError as report:
        # a misspelled key is reported twice, as unknown and as missing: the first helps more
        mistake = min(report.errors(), key=lambda error: error["type"] != "extra_forbidden")
        raise LabError(where + _explain(model, mistake)) from None


def _explain(model: type[Strict], mistake: Mapping[str, Any]) -> str:
    key, value = ".".join(str(part) for part in mistake["loc"]), mistake["input"]
    match mistake["type"]:
        case "extra_forbidden":
            valid = _profile_keys() if model is Profile else model.model_fields
            return f"unknown {'setting' if model is Profile else 'parameter'} '{key}'{nearest(key, valid)}"
        case "missing":
            return f"'{key}' is missing"
        case "value_error":
            return str(mistake["ctx"]["error"])
        case _:
            hint = "; YAML reads 1e-4 as text, write 1.0e-4" if _is_number(value) else ""
            return f"{key} = {value!r} should {_wanted(mistake['msg'])}{hint}"


def _wanted(said: str) -> str:
    """What pydantic expects, as the rest of a sentence: "Tuple should have at least 1 item after validation, not 0"."""
    return said.partition(" should ")[2].partition(" after validation")[0].replace("valid tuple", "list")


def _is_number(value: object) -> bool:
    """Whether a text holds a float in the notation that YAML does not take for one."""
    return isinstance(value, str) and bool(re.fullmatch(r"\d+e[+-]?\d+", value))
