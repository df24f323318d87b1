"""The recorded benchmarks: times and memory against a named peer, and on which machine."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from helpers.core.disk import read_json
from helpers.core.names import MERGES
from helpers.core.paths import ROOT
from helpers.run.results_page.markdown import Section, link

RECORDS = ROOT / "benchmarks" / "results"
SCORING = {
    "gram": "the lab: from the LoRA factors",
    "dense": "deltas written out",
    "fused": "deltas written out, fused",
    "loop": "deltas, channel by channel",
}
GENERATION = {"complete": "the lab: in batches", "one_by_one": "transformers, one prompt at a time"}
VACCINES = {"together": "the lab: all in one pass", "trainer": "PEFT and Trainer", "loop": "PEFT and a loop by hand"}
VACCINES_ON_GPU = "vaccines: "
SEQUENTIAL = "sequential"


def sections() -> list[Section]:
    """One table for each recorded file."""
    return [_scoring(), _generation(), _vaccines(), _vaccines_on_gpu(), _merging(), _faults()]


def _scoring() -> Section:
    record = read_json(RECORDS / "scoring.json")
    shapes = record["shapes"]
    columns = {"seconds": "seconds", "times_slower": "times slower", "peak_mb": "MB", "times_memory": "times memory"}
    return Section(
        "Scoring channels",
        f"The score of one block ({shapes['matrices']} matrices of {shapes['hidden']:,} by {shapes['width']:,}, LoRA "
        f"rank {shapes['rank']}, {shapes['n']} pairs) from the LoRA factors, against deltas written out with PyTorch.",
        _source("scoring"),
        _by_method(record["results"], SCORING, columns),
        digits=2,
    )


def _generation() -> Section:
    record = read_json(RECORDS / "generation.json")
    columns = {"seconds": "seconds", "times_slower": "times slower", "equal": "equal completions"}
    return Section(
        "Generating answers",
        f"{record['prompts']} prompts in batches of {record['batch_size']}, against `generate` of transformers.",
        _source("generation"),
        _by_method(record["results"], GENERATION, columns),
        digits=2,
    )


def _vaccines() -> Section:
    record = read_json(RECORDS / "vaccines.json")
    columns = {"seconds": "seconds", "times_slower": "times slower", "peak_rss_mb": "MB"}
    parts = {
        int(size): _by_method(part["results"], VACCINES, columns) for size, part in record["by_batch_size"].items()
    }
    return Section(
        "Training vaccines on a CPU",
        f"{record['adapters']} adapters of {record['rows']} rows each on the small model's 4-bit base, against PEFT, "
        "which trains one after the other. MB is what the process held at most while a way ran; the ways ran in one "
        "process, in the order of the table, so a later one may hold what an earlier one left.",
        _source("vaccines"),
        pd.concat(parts, names=["batch"]),
        digits=2,
    )


def _vaccines_on_gpu() -> Section:
    record = read_json(RECORDS / "gpu.json")
    rows = {
        name.removeprefix(VACCINES_ON_GPU): result
        for name, result in record["results"].items()
        if name.startswith(VACCINES_ON_GPU) and "seconds" in result
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    checkpointing = table.index.str.contains("checkpointing")
    alone = table.index.str.startswith(SEQUENTIAL)
    # PEFT's own time, with checkpointing or without as in the row
    peer = [table["seconds"][alone & (checkpointing == kind)].iloc[0] for kind in checkpointing]
    columns = {
        "seconds": table["seconds"],
        "tokens/s": table["tokens_per_second"].round().astype(int),
        "peak GB": table["peak_gb"],
        "times PEFT's speed": peer / table["seconds"],
    }
    return Section(
        "Training vaccines on a GPU",
        f"{record['arguments']['adapters']} adapters at LLaMA-2-7B's shape on one {record['hardware']}, in one pass "
        "(together) against PEFT, one after the other (sequential); GB are the memory that was allowed.",
        _source("gpu"),
        pd.DataFrame(columns).rename_axis("way"),
        digits=2,
    )


def _merging() -> Section:
    record = read_json(RECORDS / "merging.json")
    rows = {
        MERGES[method]: {
            "seconds": result["ours"]["seconds"],
            "mergekit's": result["mergekit"]["seconds"],
            "time ratio": result["seconds_ratio"],
            "MB": round(result["ours"]["peak_mb"]),
            "mergekit's MB": round(result["mergekit"]["peak_mb"]),
            "memory ratio": result["peak_mb_ratio"],
        }
        for method, result in record["results"].items()
    }
    return Section(
        "Merging checkpoints",
        f"Two models of {record['model']['megabytes']} MB in {record['model']['files']} files, merged by the lab and "
        f"by mergekit {record['versions']['mergekit']}, each in a process of its own; a "
        "ratio below 1 is in the lab's favor.",
        _source("merging"),
        pd.DataFrame.from_dict(rows, orient="index").astype({"MB": int, "mergekit's MB": int}).rename_axis("merge"),
        digits=2,
    )


def _faults() -> Section:
    record = read_json(RECORDS / "faults.json")
    cases = pd.DataFrame(record["cases"]).rename(columns={"job": "job struck"})
    cases["failed"] = cases["problems"].map(bool)
    by_kind = cases.groupby(["job struck", "target", "how"])["failed"].agg(["size", "sum"])
    return Section(
        "Faults",
        f"{record['done']} of {record['planned']} random strikes against a run or a sweep, after each of which the "
        "same command has to end with the numbers and files of an undisturbed one, bit for bit.",
        _source("faults"),
        by_kind.set_axis(["cases", "failed"], axis=1),
    )


def _by_method(results: Mapping[str, Any], names: Mapping[str, str], columns: Mapping[str, str]) -> pd.DataFrame:
    """What was measured of each method, with plain names."""
    table = pd.DataFrame.from_dict(results, orient="index")[list(columns)].rename(index=names, columns=columns)
    whole = {name: int for name in ("MB", "equal completions") if name in table}
    return table.round(dict.fromkeys(whole, 0)).astype(whole).rename_axis("method")


def _source(name: str) -> str:
    record = read_json(RECORDS / f"{name}.json")
    machine, versions = record["machine"], record["versions"]
    cpu, memory = machine["cpu"].replace("(R)", "").removesuffix(" Processor"), machine["memory_gb"]
    return (
        f"Measured with torch {versions['torch']} on {machine['cores']} cores ({cpu}), {memory} GB of memory; "
        f"recorded in {link(RECORDS / f'{name}.json')}."
    )
