"""The recorded chains of the real model as one table, for the notebooks and for the results page."""

from typing import Any

import pandas as pd

from helpers.core.disk import read_json
from helpers.core.names import ATTACKS, TASKS
from helpers.measure.reading import INDISCRIMINATE
from helpers.run.sweeps import RECORDED

RECORD = RECORDED / "real" / "smollm2-135m-instruct.json"
CHAIN = ["access", "attack", "task", "seed"]


def recorded_facts() -> dict[str, Any]:
    """What the record says of all chains: rows, decoding, hardware."""
    return {key: value for key, value in read_json(RECORD).items() if key != "chains"}


def chains() -> pd.DataFrame:
    """Every model that was measured, one row each.

    Returns:
        its chain (`CHAIN`), `development` (whether settings were chosen on it), `record` ("first" or "second"), `lr` of
        the injection, `model`, its report, the four labels as columns, and `low` and `high` of the ASR's interval.
    """
    rows = [
        {key: chain[key] for key in (*CHAIN, "development")}
        | {"record": "second" if "each_triggered" in report else "first", "model": model}
        | {"lr": chain["settings"][chain["access"]]["inject"]["lr"], **report, **report["labels"]}
        | dict(zip(("low", "high"), report["asr_interval"], strict=True))
        for chain in read_json(RECORD)["chains"]
        for model, report in chain["results"].items()
        if "asr" in report
    ]
    return pd.DataFrame(rows)


def named_chains() -> pd.DataFrame:
    """`chains` with attacks and tasks by their plain names, and `selective`: whether the implant waits for its trigger.

    An implant is *indiscriminate* where more than a tenth of the clean prompts bring its payload.
    """
    table = chains()
    table["attack"], table["task"] = table["attack"].map(ATTACKS), table["task"].map(TASKS)
    planted = table[table["model"] == "backdoored"].set_index([*CHAIN, "lr"])["false_trigger"] <= INDISCRIMINATE
    return table.join(planted.rename("selective"), on=[*CHAIN, "lr"])
