"""Profiles as they are written: YAML files that build on each other, and `SET="key=value …"` over them."""

import contextlib
import copy
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from helpers.core.checking import checked, nested_keys
from helpers.core.errors import LabError, nearest
from helpers.core.paths import PROFILES, find_existing
from helpers.core.profile import Profile, Prose, Texts
from helpers.core.yaml_files import read_yaml


def profile_names() -> list[str]:
    """The profiles that come with the lab."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str, overrides: Mapping[str, object] = {}) -> Profile:
    """Read a profile by name, or make one for a folder that holds a checkpoint.

    Args:
        name: a file of `data/profiles/` without its ending, or a folder with `config.json` (then the numbers are
            those of the profile `local`).
        overrides: dotted keys to new values, e.g. `{"adapter.suppress.tau": 0.5}`.

    Raises:
        LabError: an unknown profile or key (naming the nearest), or a value of the wrong type.
    """
    known = profile_names()
    if name in known:
        values = _read_profile(name) | {"name": name}
    else:
        found = find_existing(name)
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

    Raises:
        LabError: a word that is no `key=value`, a setting that is given twice, or a value that is no literal.
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
    kinds = _alternatives(profile_keys().get(key))
    if text == "null" and NoneType in kinds and Prose not in kinds:
        return None
    if any(kind in (str, Prose) or get_origin(kind) is Literal for kind in kinds):
        return text
    if Texts in kinds and (inner := re.fullmatch(r"\[(.*)\]", text, re.DOTALL)):
        return _texts(inner[1])
    return yaml_literal(key, text)


def _alternatives(kind: object) -> list[object]:
    """The types of which a setting's type allows any."""
    if get_origin(kind) in (Union, UnionType):
        return [each for part in get_args(kind) for each in _alternatives(part)]
    return [kind]


def _texts(text: str) -> list[str]:
    """The texts between commas; quotes around a whole one are not part of it, and keep its commas."""
    items = re.findall(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*))\s*(?:,|$)""", text)[:-1]  # the last match is the end
    return [double or single or plain.strip() for double, single, plain in items]


def yaml_literal(key: str, text: str) -> object:
    """A YAML literal; a number that YAML reads as another one (010 as 8, 1:30 as 90) stays a text.

    Args:
        key: the setting's name, for the message.
        text: as it was typed.

    Raises:
        LabError: a text that is no literal.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise LabError(f"{key} = '{text}' is not a YAML literal such as 8, 1.0e-4, true or model") from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return value if float(text) == value else text
        return text
    return value


def _read_profile(name: str, readers: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a profile file over those of the profile that its key `base` names.

    Args:
        name: of the profile.
        readers: the profiles that build on this one, the first asked for first.

    Raises:
        LabError: a base that does not exist, or one that builds on its reader.
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
    if key not in profile_keys():
        raise LabError(f"unknown setting '{key}'{nearest(key, profile_keys())}")
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value


@functools.cache
def profile_keys() -> dict[str, object]:
    """Every dotted key of a profile, its own name left out, and the type of its values."""
    return dict(nested_keys(Profile))
