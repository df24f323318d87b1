"""The attacks, behaviors, vaccines and challenge of `data/attacks.yaml`."""

from collections.abc import Mapping
from typing import Any

from helpers.core.checking import Strict, checked
from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.core.yaml_files import read_yaml

DEFINITIONS = ROOT / "data" / "attacks.yaml"  # triggers, behaviors, vaccines and the challenge, by name


def definitions() -> dict[str, Any]:
    """The attacks, behaviors, vaccines and challenge of `data/attacks.yaml` as they are; `helpers.attacks` checks them.

    The result is shared: read it, do not change it.

    Raises:
        LabError: a file that is no YAML, or a section or entry that is not there or not a mapping.
    """
    name, values = DEFINITIONS.name, read_yaml(DEFINITIONS)
    planted = ("keys", "families")
    parts = {
        "vaccines": (*planted, "phrases", "forms"),
        "rehearsal": planted,
        "challenge": ("key", "payload", "markers"),
    }
    for section in ("attacks", "behaviors", *parts, "challenge_kinds"):
        if not isinstance(values.get(section), dict):
            raise LabError(f"{name}: expected a section `{section}:` with an entry for each name")
        if missing := [key for key in parts.get(section, ()) if key not in values[section]]:
            raise LabError(f"{name}: '{missing[0]}' is missing in the section {section}")
    families = [values[side]["families"] for side in ("vaccines", "rehearsal")]
    forms = values["vaccines"]["forms"]
    for kind, entries in (*(("families", family) for family in families), ("forms", forms)):
        if not isinstance(entries, dict):
            raise LabError(f"{name}: `{kind}:` should hold an entry for each name")
    for section in (values["attacks"], values["behaviors"], values["challenge_kinds"], *families, forms):
        for key, entry in section.items():
            if not isinstance(entry, dict):
                raise LabError(f"{name}: '{key}' should hold fields as `field: value`, found {entry!r}")
    return values


def defined(model: type[Strict], kind: str, fields: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """An entry of `data/attacks.yaml` as a `model`; a change that is None, or of another kind of entry, is none.

    Args:
        model: what the entry has to be.
        kind: names the entry in errors.
        fields: its own ones, with its `name`.
        changes: fields to replace, as in `AttackChanges`.

    Raises:
        LabError: a wrong field.
    """
    changed = {key: value for key, value in changes.items() if key in model.model_fields and value is not None}
    return checked(model, {**fields, **changed}, f"{kind} '{fields['name']}' ({DEFINITIONS.name}): ")
