"""What was brought, an adapter over a base or a whole model: what may be edited, and by which numbers, follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig

from helpers.core.disk import read_json
from helpers.core.errors import LabError
from helpers.core.paths import HUB_ID, PROFILES, ROOT, existing, find_existing
from helpers.core.profile_files import load_profile, profile_names
from helpers.core.yaml_files import read_yaml
from helpers.model.adapters import is_adapter, read_adapter
from helpers.model.architecture import attention_slots, mlp_slots, parameter_shapes
from helpers.model.checkpoint import load_config
from helpers.model.shards import ADAPTER_CONFIG, CONFIG
from helpers.model.tokenizer import recorded_format


@dataclass(frozen=True)
class Suspect:
    """A suspicious model, where its architecture stands, and the profile whose numbers suit it.

    Args:
        folder: of the adapter or the whole model.
        access: "adapter" or "full".
        base: folder or hub id of the model that was fine-tuned; of a whole model without a known base the model itself.
        knows_base: whether `base` is another model than the suspicious one, and may be merged with it.
        profile: name of the profile, or folder of the base, where none of the lab's profiles is of such a model.
    """

    folder: Path
    access: str
    base: str
    knows_base: bool
    profile: str

    @cached_property
    def adapted(self) -> frozenset[str]:
        """The matrices that an adapter changes, by the names they have in the base."""
        return frozenset(read_adapter(self.folder).modules)

    def scored(self, config: PretrainedConfig) -> list[str]:
        """The MLP matrices whose channels can be scored and suppressed: all of them, or those an adapter changes.

        Args:
            config: of the base.
        """
        modules = [slot.module for layer in mlp_slots(config) for slot in layer]
        return [module for module in modules if self.access == "full" or module in self.adapted]

    def adapts_attention(self, config: PretrainedConfig) -> bool:
        """Whether heads can be suppressed: in a whole model, or where an adapter changes an attention matrix.

        Args:
            config: of the base.
        """
        modules = {slot.module for layer in attention_slots(config) for slot in layer}
        return self.access == "full" or bool(modules & self.adapted)


def find_suspect(suspect: str, base: str = "", profile: str = "") -> Suspect:
    """Look at a folder and tell what it holds; no weight of a whole model is read.

    Args:
        suspect: folder of a PEFT adapter or a whole model.
        base: folder or hub id of what it was fine-tuned from; of an adapter, empty: what its own settings name.
        profile: whose numbers are to be taken; empty: that of a model with this base or these sizes, else `local`.

    Raises:
        LabError: no such folder, neither an adapter nor a model, an adapter whose base is not here, or an unknown
            profile.
    """
    found = find_existing(suspect)
    if not found or not Path(found).is_dir():
        raise LabError(f"SUSPECT = '{suspect}' is no folder; expected one with a PEFT adapter or a whole model")
    folder = Path(found)
    if is_adapter(folder):
        base = _base_of(folder, base)
        return Suspect(folder, "adapter", base, True, profile or _profile_of(base))
    if not (folder / CONFIG).is_file():
        raise LabError(
            f"SUSPECT = '{suspect}' holds neither {ADAPTER_CONFIG} nor {CONFIG}: expected a PEFT adapter or a whole "
            "model"
        )
    known = bool(base)
    base = _located(base) if known else str(folder)
    return Suspect(folder, "full", base, known, profile or _profile_of(base))


def _base_of(adapter: Path, base: str) -> str:
    """The base of an adapter: what was given, or what the adapter names."""
    if base:
        return _located(base)
    named = read_adapter(adapter).settings.get("base_model_name_or_path")
    if not named:
        raise LabError(f"the adapter in {adapter} names no base model: give its folder or hub id in BASE")
    if not find_existing(str(named)) and not HUB_ID.fullmatch(str(named)):
        raise LabError(f"the adapter in {adapter} names the base '{named}', which is not here: give its folder in BASE")
    return existing(str(named))


def _located(base: str) -> str:
    if not find_existing(base) and not HUB_ID.fullmatch(base):
        raise LabError(f"BASE = '{base}' is neither a folder nor a hub id")
    return existing(base)


def _profile_of(base: str) -> str:
    """The lab's profile of a base: by its path or its sizes; the base's own folder where there is none."""
    paths = {name: read_yaml(PROFILES / f"{name}.yaml").get("model", {}).get("path", "") for name in profile_names()}
    for name, path in paths.items():
        if path and (path == base or find_existing(path) == base):
            return name
    if not Path(base).is_dir():
        raise LabError(
            f"no profile is known for the base '{base}': name one in PROFILE, or download it and give its folder"
        )
    here = {name: ROOT / path for name, path in paths.items() if path and (ROOT / path / CONFIG).is_file()}
    return next((name for name, folder in here.items() if _alike(name, folder, Path(base))), base)


def _alike(profile: str, own: Path, base: Path) -> bool:
    """Whether a base has the architecture, the shapes of all matrices and the heads of a profile's own model."""
    kinds = [read_json(folder / CONFIG).get("model_type") for folder in (own, base) if (folder / CONFIG).is_file()]
    if len(kinds) < 2 or kinds[0] != kinds[1]:
        return False
    spec = load_profile(profile).model
    first, second = (load_config(spec, folder) for folder in (own, base))  # with the defaults that a file leaves out
    # the shapes tell how wide all heads are together, and so with their number everything of them
    same_heads = first.num_attention_heads == second.num_attention_heads
    return same_heads and parameter_shapes(first) == parameter_shapes(second)


def overrides_for(suspect: Suspect) -> dict[str, object]:
    """What a profile has to be told of this model: where it lies, and in which prompt format it was trained."""
    told: dict[str, object] = {}
    if load_profile(suspect.profile).model.path != suspect.base:
        told["model.path"] = suspect.base
    if recorded := recorded_format(suspect.folder):
        told["model.prompt_format"] = recorded["name"]
    return told
