"""Rates and numbers as text: percent with a fixed count of decimals, means with their lowest and highest value."""

from collections.abc import Iterable
from statistics import mean

import pandas as pd

GAP = "–"


def number(value: float, digits: int = 1) -> str:
    """A number with a fixed count of decimals; an en dash where there is none."""
    if pd.isna(value):
        return GAP
    return f"{round(value, 6):z.{digits}f}".replace("-", "−")  # means differ in their last bits between machines


def percent(value: float) -> str:
    """A rate in [0, 1] as a number of percent."""
    return number(100 * value)


def span(values: Iterable[float]) -> str:
    """Rates in [0, 1] in percent: their mean, with the lowest and the highest where there are several."""
    rates = [value for value in values if not pd.isna(value)]
    if not rates:
        return GAP
    low_and_high = f" ({percent(min(rates))} – {percent(max(rates))})" if len(rates) > 1 else ""
    return percent(mean(rates)) + low_and_high


def with_interval(rate: float, low: float, high: float) -> str:
    """A rate in [0, 1] in percent, with its interval in brackets."""
    return f"{percent(rate)} ({percent(low)} – {percent(high)})"


def ends(values: Iterable[float]) -> str:
    """The lowest and the highest of some rates in [0, 1], in percent; one number where they are the same."""
    return " to ".join(dict.fromkeys(map(percent, (min(values := list(values)), max(values)))))
