"""Recorded points for the sliders: what `data/results/` holds for one number of a method, setting by setting."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results"

Row = dict[str, object]
Point = dict[str, float]  # {"at": the slider's value, "asr": in %, "utility": in %, "n": prompts, "seeds": how many}


def rows_of(sweep: str) -> list[Row]:
    """The rows of a recorded sweep."""
    return json.loads((RESULTS / f"{sweep}.json").read_text(encoding="utf-8"))["rows"]


def point(at: float, rows: Iterable[Row]) -> Point:
    """One position of a slider: the means over the rows, one row a seed."""
    rows = list(rows)
    asr, utility = (round(100 * mean(row[rate] for row in rows), 1) for rate in ("asr", "utility"))
    return {"at": at, "asr": asr, "utility": utility, "n": rows[0]["n"], "seeds": len(rows)}


def by_share(ranking: str, model: str) -> list[Point]:
    """What one ranking leaves at every recorded share τ with full access, after recovery."""
    points = []
    for row in rows_of("full_access"):
        if row["model"] == model:
            points.append(point(row["full.suppress.tau"], [row]))
        elif row["model"].startswith(f"tau/{ranking}-"):
            points.append(point(float(row["model"].rpartition("-")[2]), [row]))
    return sorted(points, key=lambda each: each["at"])


def share_study() -> dict[str, list[Point]]:
    return {"signature": by_share("signature", "purified"), "random channels": by_share("random", "random")}


def vaccine_study() -> dict[str, list[Point]]:
    """One to seven pairs: insults, half of the channels and half of the heads."""
    rows = rows_of("variants")
    numbers = sorted({row["signature.n"] for row in rows})
    return {
        name: [point(n, [row for row in rows if (row["signature.n"], row["model"]) == (n, model)]) for n in numbers]
        for name, model in (("suppressed", "suppressed"), ("BD-VAX", "purified"))
    }


def merge_study() -> dict[str, list[Point]]:
    rows = [row for row in rows_of("merges") if row["model"] == "conflict" and row.get("conflict.t") is not None]
    names = {"linear": "linear", "SLERP": "slerp", "SLERP by tensor": "slerp_by_tensor"}
    return {
        name: [point(row["conflict.t"], [row]) for row in rows if row["conflict.method"] == method]
        for name, method in names.items()
    }


STUDIES: dict[str, tuple[str, Callable[[], dict[str, list[Point]]]]] = {
    "share": ("τ", share_study),
    "vaccines": ("N", vaccine_study),
    "merge": ("t", merge_study),
}
