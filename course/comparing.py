"""What an answer returned, held against what it should have: numbers within a tolerance, everything else exactly."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

MOST_SHOWN = 8  # numbers of an array
TINY = 1e-7  # errors below this are none, even of an expected zero


def difference(found: Any, expected: Any, tolerance: float = 1e-5) -> str | None:
    """What tells a result from the expected one.

    Args:
        found: numbers, strings, arrays or tensors, also in lists, tuples, sets and dicts.
        expected: the same; a list stands for a tuple, an array or a tensor as well.
        tolerance: the largest relative error of a number.

    Returns:
        one or two lines, or None where there is no difference.
    """
    if isinstance(expected, Mapping):
        return _difference_of_dicts(found, expected, tolerance)
    if isinstance(expected, set | frozenset | str | bool | np.bool_) or expected is None:
        return None if _same(found, expected) else _both(found, expected)
    if (wanted := _array(expected)) is not None:
        return _difference_of_arrays(found, wanted, tolerance)
    if isinstance(expected, Sequence):
        return _difference_of_lists(found, expected, tolerance)
    return None if found == expected else _both(found, expected)


def changed(after: Sequence[Any], before: Sequence[Any]) -> str:
    """Which argument of a call is no longer what it was, as words; "" where all are."""
    for position, (now, then) in enumerate(zip(after, before, strict=True), 1):
        if not callable(then) and difference(now, then, 0.0):
            return f"argument {position}"
    return ""


def shown(value: Any) -> str:
    """A value in one short line."""
    array = _array(value)
    if array is None or array.dtype == object or isinstance(value, str):
        text = repr(value)
        return text if len(text) <= 160 else text[:157] + "…"
    if array.ndim == 0:
        return _number(array.item())
    flat = array.ravel()
    values = ", ".join(_number(x.item()) for x in flat[:MOST_SHOWN])
    if array.ndim == 1:
        return f"[{values}{', …' if len(flat) > MOST_SHOWN else ''}]"
    return f"shape {list(array.shape)}, row by row {values}{', …' if len(flat) > MOST_SHOWN else ''}"


def _number(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _array(value):
    """Numbers as an array; None for what is none."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray | numbers.Number):
        return np.asarray(value)
    if isinstance(value, list | tuple) and value and all(isinstance(x, numbers.Number | torch.Tensor) for x in value):
        if all(not isinstance(x, torch.Tensor) or x.ndim == 0 for x in value):
            return np.array([x.item() if isinstance(x, torch.Tensor) else x for x in value])
    return None


def _same(found, expected):
    if isinstance(expected, bool | np.bool_):
        if isinstance(found, torch.Tensor) and found.numel() == 1:
            found = found.item()
        return isinstance(found, bool | np.bool_) and bool(found) == bool(expected)
    return type(found) in (type(expected), set, frozenset) and found == expected


def _both(found, expected):
    return f"expected {shown(expected)}\n  got      {shown(found)}"


def _difference_of_dicts(found, expected, tolerance):
    if not isinstance(found, Mapping):
        return f"expected a dict with the keys {shown(list(expected))}\n  got      {shown(found)}"
    if found.keys() != expected.keys():
        missing, odd = ([k for k in one if k not in other] for one, other in ((expected, found), (found, expected)))
        return f"keys that are missing: {_listed(missing)}; keys that should not be there: {_listed(odd)}"
    for key in expected:
        if told := difference(found[key], expected[key], tolerance):
            return f"at {key!r}: {told}"
    return None


def _listed(keys):
    return ", ".join(map(repr, keys[:3])) + (", …" if len(keys) > 3 else "") or "none"


def _difference_of_lists(found, expected, tolerance):
    if isinstance(found, str) or not isinstance(found, Sequence) or len(found) != len(expected):
        return _both(found, expected)
    for position, (one, other) in enumerate(zip(found, expected, strict=True)):
        if told := difference(one, other, tolerance):
            return _both(found, expected) if len(repr(expected)) < 100 else f"at position {position}: {told}"
    return None


def _difference_of_arrays(found, wanted, tolerance):
    got = _array(found)
    if got is None:
        return f"expected {shown(wanted)}\n  got      {shown(found)} ({type(found).__name__})"
    if got.shape != wanted.shape:
        return f"expected shape {list(wanted.shape)}, got {list(got.shape)}\n  " + _both(found, wanted)
    if (got.dtype == bool) != (wanted.dtype == bool):
        kinds = ["a mask of True and False" if array.dtype == bool else "numbers" for array in (wanted, got)]
        return f"expected {kinds[0]}, got {kinds[1]}\n  " + _both(found, wanted)
    if wanted.dtype.kind in "fc" or got.dtype.kind in "fc":
        right = np.isclose(got, wanted, rtol=tolerance, atol=TINY if tolerance else 0.0, equal_nan=True)
    else:
        right = got == wanted
    if right.all():
        return None
    at = tuple(int(i) for i in np.argwhere(~right)[0]) if right.ndim else ()
    place = f", first at {list(at)}: {_number(got[at].item())} for {_number(wanted[at].item())}" if len(at) > 1 else ""
    return _both(found, wanted) + place
