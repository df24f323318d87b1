"""Settings that are checked strictly before anything runs, and every mistake told in one line."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from helpers.core.errors import LabError, nearest


class Strict(BaseModel):
    """Frozen settings without type conversion: '3' is no integer, True is no number; 3 is a fine float."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def nested_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every dotted key of the sections in a model, and the type of its values; what lies in no section is left out."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from nested_keys(field.annotation, f"{prefix}{name}.")
        elif prefix:
            yield prefix + name, field.annotation


def checked(model: type[Strict], values: dict[str, Any], where: str) -> Any:
    """Validate, turning pydantic's report into one line about the first mistake.

    Args:
        model: what the values have to make.
        values: the fields by name.
        where: the beginning of the message.

    Raises:
        LabError: names the field, its value and what was expected.
    """
    try:
        return model(**values)
    except ValidationError as report:
        # a misspelled key is reported twice, as unknown and as missing: the first helps more
        mistake = min(report.errors(), key=lambda error: error["type"] != "extra_forbidden")
        raise LabError(where + _explain(model, mistake)) from None


def first_mistake(report: ValidationError, whole: str) -> str:
    """Where a text from elsewhere is wrong first, and how, without what it holds: it may be long, or secret.

    Args:
        report: of pydantic.
        whole: what to call the text where all of it is wrong.
    """
    mistake = report.errors(include_input=False)[0]
    return f"{'.'.join(map(str, mistake['loc'])) or whole}: {mistake['msg']}"


def _explain(model: type[Strict], mistake: Mapping[str, Any]) -> str:
    key, value = ".".join(str(part) for part in mistake["loc"]), mistake["input"]
    match mistake["type"]:
        case "extra_forbidden":
            nested = dict(nested_keys(model))
            what, valid = ("setting", nested) if nested else ("parameter", model.model_fields)
            return f"unknown {what} '{key}'{nearest(key, valid)}"
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
    return isinstance(value, str) and bool(re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][+-]?\d+", value))
