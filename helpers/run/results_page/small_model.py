"""The main result of the small model, beside what the papers print."""

import pandas as pd

from helpers.core.disk import read_json
from helpers.core.names import ATTACKS, MODELS, TASKS
from helpers.core.paths import ROOT
from helpers.core.yaml_files import read_yaml
from helpers.run.pipeline import RESULTS, by_setting
from helpers.run.rates import span
from helpers.run.results_page.markdown import Section, link
from helpers.run.results_page.sweeps import data_source, recorded, source
from helpers.run.sweep_tables import means

PAPERS = ROOT / "data" / "results" / "papers.yaml"
COLUMNS = {"ASR %": "asr", "answered right %": "right_under_trigger", "utility %": "utility"}


def sections() -> list[Section]:
    """The main table of every setting that was recorded, and the papers' numbers beside the small model's."""
    return [*map(_main, by_setting(read_json(RESULTS))), _beside_main(), *map(_beside_attacks, ("adapter", "full"))]


def _main(setting: str) -> Section:
    models = by_setting(read_json(RESULTS))[setting]
    access, task = setting.split(", ")
    rows = {MODELS[model]: {name: span(values[m]) for name, m in COLUMNS.items()} for model, values in models.items()}
    return Section(
        f"Every model: {TASKS[task]}, {access} access",
        "What each model does with triggered prompts, and how well it answers clean ones: means over the seeds, lowest "
        "and highest in brackets. All trainings that heal have the same number of rows and steps.",
        _source_of_runs(access, task),
        pd.DataFrame.from_dict(rows, orient="index").rename_axis("model"),
    )


def _source_of_runs(access: str, task: str) -> str:
    runs = [run for run in read_json(RESULTS).values() if (run["access"], run["task"]) == (access, task)]
    prompts, seeds = (pd.Series(values) for values in ([r["clean"]["n"] for r in runs], [r["seed"] for r in runs]))
    settings = {(run["profile"], run["attack"]) for run in runs}
    made = " and ".join(f"`make run PROFILE={p} ATTACK={a} TASK={task} ACCESS={access}`" for p, a in sorted(settings))
    return f"{data_source(RESULTS, prompts, seeds)} Each seed is a run of {made}."


def _beside_main() -> Section:
    ours, theirs = by_setting(read_json(RESULTS)), read_yaml(PAPERS)["bdvax"]
    rows = {}
    for access in ("adapter", "full"):
        printed = {"backdoored": theirs["backdoored"]} | theirs[access]
        for model in ("backdoored", "finetuned", "random", "purified"):
            paper = printed.get(model, {}).get("sentiment", {}).get("badnets", float("nan"))
            rows[access, MODELS[model]] = (paper, span(ours[f"{access}, sentiment"][model]["asr"]))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["paper: ASR %", "small model: ASR %"])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["access", "model"])
    return Section(
        "Beside the BD-VAX paper: the main result",
        "Table 2 of the paper (LLaMA-2-7B-Chat, BadNets, sentiment steering) beside the small model. Only the order of "
        "the methods can be compared; the paper has no random row with full access.",
        f"{link(PAPERS)} and {link(RESULTS)}.",
        table,
    )


def _beside_attacks(access: str) -> Section:
    theirs, ours = read_yaml(PAPERS)["bdvax"][access]["purified"], recorded("attacks")
    ours = means(ours[ours["ACCESS"] == access], "purified", ["TASK", "ATTACK"])
    columns = {}
    for task, printed in theirs.items():
        columns[f"{TASKS[task]}: paper"] = printed
        columns[f"{TASKS[task]}: small model"] = {attack: ours[task, attack] for attack in printed}
    return Section(
        f"Beside the BD-VAX paper: every attack, {access} access",
        "ASR in percent after BD-VAX, in the paper's Table 2 and in the small model (BadNets with refusal: the mean of "
        "all seeds, the others: the first).",
        f"{link(PAPERS)}. {source('attacks')}",
        pd.DataFrame(columns).rename(index=ATTACKS).rename_axis("attack"),
    )
