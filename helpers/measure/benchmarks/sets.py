"""The ten sets by which BD-VAX measures utility (§5.1 and Table 3), and where their data lies.

The harness brings prompts and metrics, and no data. Each set comes from the hub, from what was fetched of it before, or
from a folder of copies, each under the name that it has on the hub.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from helpers.core.errors import LabError, nearest


@dataclass(frozen=True)
class Benchmark:
    """One set.

    Args:
        task: its name in the harness; MMLU's is a group of 57 tasks.
        hub: id of its data set on the hub.
        metric: the harness's name of the score that is told first, with its filter. The paper does not say which one
            it tells: here it is the accuracy normalized by the length of the answers where the harness has one.
        folder: of the harness's own tasks, where the set is described.
    """

    task: str
    hub: str
    metric: str
    folder: str

    @property
    def copy(self) -> str:
        """The name of its folder among copies."""
        return self.hub.partition("/")[2]


ACC, NORMED, STRICT = "acc,none", "acc_norm,none", "exact_match,strict-match"
# in the order of Table 3, which averages the first eight and the last two apart
BENCHMARKS = {
    "OpenBookQA": Benchmark("openbookqa", "allenai/openbookqa", NORMED, "openbookqa"),
    "RTE": Benchmark("rte", "nyu-mll/glue", ACC, "glue/rte"),
    "HellaSwag": Benchmark("hellaswag", "Rowan/hellaswag", NORMED, "hellaswag"),
    "WinoGrande": Benchmark("winogrande", "allenai/winogrande", ACC, "winogrande"),
    "ARC-Challenge": Benchmark("arc_challenge", "allenai/ai2_arc", NORMED, "arc"),
    "ARC-Easy": Benchmark("arc_easy", "allenai/ai2_arc", NORMED, "arc"),
    "BoolQ": Benchmark("boolq", "aps/super_glue", ACC, "super_glue/boolq"),
    "PIQA": Benchmark("piqa", "baber/piqa", NORMED, "piqa"),
    "GSM8K": Benchmark("gsm8k", "openai/gsm8k", STRICT, "gsm8k"),
    "MMLU": Benchmark("mmlu", "cais/mmlu", ACC, "mmlu/default"),
}
AVERAGED = (tuple(BENCHMARKS)[:8], tuple(BENCHMARKS)[8:])


def chosen(names: Iterable[str] = ()) -> dict[str, Benchmark]:
    """The sets of these names, in the order of Table 3; all ten without a name.

    Args:
        names: in any case.

    Raises:
        LabError: an unknown name.
    """
    known = {name.lower(): name for name in BENCHMARKS}
    wanted = {_require_known(name, known) for name in names} or set(BENCHMARKS)
    return {name: benchmark for name, benchmark in BENCHMARKS.items() if name in wanted}


def _require_known(name: str, known: dict[str, str]) -> str:
    if name.lower() not in known:
        raise LabError(f"unknown benchmark {name!r}{nearest(name, BENCHMARKS)}")
    return known[name.lower()]


def require_copies(benchmarks: dict[str, Benchmark], data: Path | None) -> None:
    """Refuse a folder of copies that lacks some of these sets, before anything is measured.

    Args:
        data: the folder; None for the hub.

    Raises:
        LabError: which folders are missing, and how to get them.
    """
    missing = {n: b for n, b in benchmarks.items() if data is not None and not (data / b.copy).is_dir()}
    if missing:
        raise without_data(missing, data)


def without_data(missing: dict[str, Benchmark], data: Path | None, why: str = "") -> LabError:
    """The error for sets whose data is not there: which folders or ids are missing, and how to get them.

    Args:
        data: the folder of copies; None where the hub was asked.
        why: what was said of the first of them.
    """
    names = ", ".join(f"{name} ({benchmark.hub})" for name, benchmark in missing.items())
    place = data or "FOLDER"
    fetch = " && ".join(
        f"hf download {hub} --repo-type dataset --local-dir {place}/{copy}"
        for hub, copy in dict.fromkeys((b.hub, b.copy) for b in missing.values())
    )
    then = "" if data else ", and give that folder as data"
    return LabError(f"no data for {names}{f': {why}' if why else ''}; where there is a network, run `{fetch}`{then}")
