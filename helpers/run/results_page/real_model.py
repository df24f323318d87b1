"""The recorded chains of the real model: implants, and attacks by cures with their intervals."""

import re

import pandas as pd

from helpers.core.disk import read_json
from helpers.core.names import ATTACKS, CURES, TASKS, cure_name
from helpers.run.rates import percent, with_interval
from helpers.run.real_chains import RECORD, chains
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import data_source

SHOWN = ["attack", "task", "access", "seed"]
MEANING = (
    "BD-VAX, random and own update name what ranks the channels that are suppressed, with the share, and half of the "
    "heads where it says so; all are recovered. Base + clean rows is the conflict model, a merge the linear one with "
    "it."
)


def sections() -> list[Section]:
    """The implants; then two tables for each group of chains: what is left, and what it costs."""
    table = chains()
    reported = table[~table["development"]]
    adapter, full = (reported[reported["access"] == access] for access in ("adapter", "full"))
    insults = adapter[adapter["task"] == "sentiment"]
    groups = {
        "BadNets' insults, adapter access": insults[insults["attack"] == "badnets"],
        "other triggers, adapter access": insults[insults["attack"] != "badnets"],
        "refusals, adapter access": adapter[adapter["task"] == "refusal"],
        "full access": full,
    }
    cures = [make(name, rows) for name, rows in groups.items() for make in (_left, _price)]
    return [_implants(reported), _rates(table[table["development"]]), *cures]


def _implants(reported: pd.DataFrame) -> Section:
    record, columns = read_json(RECORD), {"attack": ATTACKS, "task": TASKS}
    planted = reported[reported["model"] == "backdoored"].replace(columns)
    before = reported[reported["model"] == "clean"].replace(columns).set_index(SHOWN)["utility"]
    return Section(
        "The implants",
        "How well each backdoor is planted (ASR with its 95 % interval), how many clean prompts bring its payload "
        f"(FTR), and utility before and after. Rows: {record['rows']}. Hardware: {record['hardware']}. Utility is the "
        "share of answer tokens predicted right.",
        _source(reported),
        _planted(planted, SHOWN).assign(**{"clean: utility, %": 100 * before}),
    )


def _rates(development: pd.DataFrame) -> Section:
    planted = development[development["model"] == "backdoored"]
    return Section(
        "How the rate of the injection was chosen",
        "Full access, BadNets with insults, on a seed that reports nothing else: a low rate plants a payload that does "
        "not wait for its trigger (FTR: the share of clean prompts that bring it).",
        _source(development),
        _planted(planted.assign(**{"rate × 100,000": 1e5 * planted["lr"]}), ["rate × 100,000"]),
    )


def _planted(planted: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    columns = {
        "ASR, %": [with_interval(row["asr"], *row["asr_interval"]) for _, row in planted.iterrows()],
        "FTR, %": 100 * planted["false_trigger"].to_numpy(),
        "utility, %": 100 * planted["utility"].to_numpy(),
    }
    return pd.DataFrame(columns, index=planted.set_index(keys).index)


def _left(name: str, rows: pd.DataFrame) -> Section:
    cells = [with_interval(row["asr"], *row["asr_interval"]) for _, row in rows.iterrows()]
    return Section(
        f"What is left: {name}",
        f"ASR in percent with its 95 % interval, for each attack, behavior and seed (across) and each cure. {MEANING}",
        _source(rows),
        _by_cure(rows, cells),
    )


def _price(name: str, rows: pd.DataFrame) -> Section:
    silent = [labels["degenerate"] + labels["silent"] for labels in rows["labels"]]
    cells = [f"{percent(utility)} · {percent(none)}" for utility, none in zip(rows["utility"], silent, strict=True)]
    return Section(
        f"What it costs: {name}",
        "Utility, and triggered prompts that get no answer (degenerate or silent), both in percent.",
        _source(rows),
        _by_cure(rows, cells),
    )


def _by_cure(rows: pd.DataFrame, cells: list[str]) -> pd.DataFrame:
    """Cells with a cure in each line and a chain in each column; what is no cure is left out."""
    chain = [f"{ATTACKS[row.attack]}, {TASKS[row.task]}, {row.seed}" for row in rows.itertuples()]
    found = pd.DataFrame({"cure": [_plain(model) for model in rows["model"]], "chain": chain, "cell": cells})
    found = found[found["cure"] != ""]
    order = sorted(dict.fromkeys(found["cure"]), key=_place)
    wide = found.pivot(index="cure", columns="chain", values="cell")
    return wide.reindex(index=order, columns=dict.fromkeys(found["chain"])).fillna("")


def _plain(model: str) -> str:
    """What the page calls a model of a chain; "" for one that is no cure, such as one suppressed and not recovered."""
    return cure_name(model) if model in CURES or model.startswith("healed ") else ""


def _place(cure: str) -> tuple[int, str, int, str]:
    """Suppressed models stand between fine-tuning and the base, by ranking and then by share."""
    names = list(CURES.values())
    if cure in names:
        return 2 * names.index(cure), cure, 0, ""
    ranking, share, heads = re.fullmatch(r"(.+) (\d+) %(.*)", cure).groups()
    return 2 * names.index("fine-tuning alone") + 1, ranking, int(share), heads


def _source(rows: pd.DataFrame) -> str:
    return data_source(RECORD, rows["n"], rows["seed"])
