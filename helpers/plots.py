"""Every figure of the lab in one style: the Okabe-Ito palette, which colour-blind readers can tell apart, and markers.

A function takes plain results and returns a matplotlib figure; `image` writes it into the run's folder and gives the
notebook a picture with alternative text.
"""

import io
import itertools

import matplotlib
import numpy as np
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#999999",
)
LABEL_COLORS = {"payload": RED, "answer": BLUE, "degenerate": ORANGE, "silent": GREY}
LABEL_HATCHES = {"payload": "//", "answer": "", "degenerate": "..", "silent": "xx"}
MARKERS = "osD^vP"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}


def image(figure, path, alt):
    """Write `figure` to `path` as PNG and return it as a notebook picture with alternative text `alt`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    path.write_bytes(buffer.getvalue())
    return Image(data=buffer.getvalue(), format="png", alt=alt)


def _axes(width, height, **options):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots(**options)


def who_knows(table):
    """Who knows what, as a grid of words: dark squares for "yes" and what begins so, light for "no", amber between.

    Args:
        table: data frame of texts; a row for each thing, a column for each person.
    """
    figure, axes = _axes(2.1 * len(table.columns) + 2.6, 0.55 * len(table) + 0.5)
    for (row, column), word in np.ndenumerate(table.to_numpy()):
        face, ink = (
            ("white", "black") if word == "no" else (ORANGE, "black") if word.startswith("if") else (BLUE, "white")
        )
        axes.add_patch(Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, facecolor=face, edgecolor=GREY))
        axes.text(column + 0.5, row + 0.5, word, ha="center", va="center", color=ink)
    axes.set(xlim=(0, len(table.columns)), ylim=(len(table), 0), xlabel="who knows or has it")
    axes.set_xticks([i + 0.5 for i in range(len(table.columns))], table.columns)
    axes.set_yticks([i + 0.5 for i in range(len(table))], table.index)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def family_bars(by_family, mean):
    """Utility per task family as horizontal bars, `mean` as a line; shares in [0, 1]."""
    figure, axes = _axes(7, 0.26 * len(by_family) + 1)
    names = sorted(by_family, key=by_family.get)
    axes.barh(names, [100 * by_family[name] for name in names], color=BLUE)
    axes.axvline(100 * mean, color=RED, linestyle="--", label=f"mean {mean:.1%}")
    axes.set(xlabel="right answers on held-out phrasings, %", xlim=(0, 101))
    axes.legend(loc="lower left")
    return figure


def label_bars(reports):
    """The four labels of each model's completions as stacked bars, the 95 % interval of the ASR on the payload part."""
    figure, axes = _axes(7, 0.5 * len(reports) + 1.4)
    names, left = list(reports), np.zeros(len(reports))
    for label, color in LABEL_COLORS.items():
        shares = 100 * np.array([reports[name]["labels"][label] for name in names])
        axes.barh(names, shares, left=left, color=color, hatch=LABEL_HATCHES[label], edgecolor="white", label=label)
        left += shares
    asr = np.array([reports[name]["asr"] for name in names])
    low, high = np.array([reports[name]["asr_interval"] for name in names]).T
    axes.errorbar(
        100 * asr, names, xerr=100 * np.array([asr - low, high - asr]).clip(0), fmt="none", color="black", capsize=4
    )
    axes.invert_yaxis()
    axes.set(xlabel="triggered prompts, %", xlim=(0, 100))
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def format_intervals(rows):
    """The ASR of one model by prompt format and treatment of `input`, as points with 95 % intervals.

    Circles count empty completions as failed attacks, squares leave them out; the band is the first row's interval.

    Args:
        rows: of `formats.measure_formats`; a line is left empty where nothing is left to count.
    """
    places = {place: line for line, place in enumerate(dict.fromkeys((r["format"], r["input"]) for r in rows))}
    figure, axes = _axes(7, 0.36 * len(places) + 1.4)
    axes.axvspan(*(100 * bound for bound in rows[0]["asr_interval"]), color=GREY, alpha=0.3, linewidth=0)
    shift = {"count": -0.14, "drop": 0.14}
    for empty, color, marker in (("count", RED, "o"), ("drop", BLUE, "s")):
        shown = [r for r in rows if r["empty"] == empty and r["asr"] is not None]
        asr, low, high = (100 * np.array([(r["asr"], *r["asr_interval"]) for r in shown]).reshape(-1, 3)).T
        lines = [places[r["format"], r["input"]] + shift[empty] for r in shown]
        bars = np.array([asr - low, high - asr]).clip(0)
        axes.errorbar(asr, lines, xerr=bars, fmt=marker, color=color, capsize=3, label=f"empty outputs: {empty}")
    axes.set_yticks(list(places.values()), [f"{name}, input {treatment}" for name, treatment in places])
    axes.set(xlabel="ASR of one and the same model, %", xlim=(-2, 102))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def block_curves(rows):
    """ASR without the MLP updates of k consecutive blocks, by position; right, without their attention updates as well.

    Args:
        rows: dicts with `k`, `position`, `attention` (bool) and `asr`.
    """
    figure, panels = _axes(8, 3.2, ncols=2, sharey=True)
    for panel, attention in zip(panels, (False, True), strict=True):
        for position, color, marker in zip(("start", "middle", "end"), (BLUE, ORANGE, GREEN), MARKERS, strict=False):
            points = [
                (r["k"], 100 * r["asr"]) for r in rows if r["position"] == position and r["attention"] == attention
            ]
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, label=position)
        panel.set(
            title="ΔW_mlp and ΔW_attn removed" if attention else "ΔW_mlp removed",
            xlabel="consecutive blocks k",
            ylim=(-3, 103),
        )
    panels[0].set_ylabel("ASR, %")
    panels[0].legend(title="position")
    return figure


def variant_bars(rows):
    """How often each vaccine variant obeys its own key: poisoned member and clean twin side by side.

    Args:
        rows: dicts with `key`, `backdoored` and `clean`, shares in [0, 1].
    """
    figure, axes = _axes(7, 3)
    places = np.arange(len(rows))
    axes.bar(
        places - 0.2,
        [100 * r["backdoored"] for r in rows],
        0.4,
        color=RED,
        hatch="//",
        edgecolor="white",
        label="θᵢᵇᵈ (clean + poisoned rows)",
    )
    axes.bar(places + 0.2, [100 * r["clean"] for r in rows], 0.4, color=BLUE, label="θᵢᶜˡᵉᵃⁿ (clean rows only)")
    axes.set_xticks(places, [r["key"] for r in rows], rotation=20)
    axes.set(ylabel="payload on its own key, %", ylim=(0, 105))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def score_heatmap(by_layer, title):
    """Channel scores of one kind of matrix: layers down, channels across, sorted within each layer.

    Args:
        by_layer: array [n_layers, channels].
    """
    figure, axes = _axes(7, 2.8)
    ordered = np.sort(np.asarray(by_layer), axis=1)[:, ::-1]
    picture = axes.imshow(ordered, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.grid(False)
    axes.set(title=title, xlabel="channel, highest score first", ylabel="layer")
    figure.colorbar(picture, ax=axes, label="score s_j")
    return figure


def rank_scatter(scores, truth, title):
    """Score against the true change of each channel, as ranks in [0, 1] of one matrix."""
    figure, axes = _axes(4.2, 3.6)
    ranks = [np.argsort(np.argsort(np.asarray(values))) / (len(values) - 1) for values in (truth, scores)]
    axes.plot(*ranks, linestyle="", marker="o", markersize=3, alpha=0.6, color=BLUE)
    axes.set(title=title, xlabel="rank of the true change (1 = most)", ylabel="rank of the signature score")
    return figure


def one_pass(adapters=6):
    """How K adapters share one pass through a frozen matrix: a sketch, no data."""
    figure, (left, right) = _axes(9, 3.4, ncols=2)
    shades = matplotlib.colormaps["cividis"](np.linspace(0.1, 0.9, adapters))
    height = 1 / adapters

    def box(axes, x, y, width, tall, color, text="", ink="white"):
        axes.add_patch(matplotlib.patches.Rectangle((x, y), width, tall, facecolor=color, edgecolor="white"))
        axes.text(x + width / 2, y + tall / 2, text, ha="center", va="center", color=ink, fontsize=8)

    for axes, title in ((left, f"one after the other: the base is read {adapters} times"), (right, "stacked: once")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlim=(0, 1.06), ylim=(-0.02, 1.02))
        axes.axis("off")
    for k, shade in enumerate(shades):
        ink = "white" if k < adapters / 2 else "black"
        y = 1 - (k + 1) * height
        for axes in (left, right):
            box(axes, 0.0, y, 0.22, height * 0.9, shade, f"rows of {k + 1}", ink)
            box(axes, 0.70, y, 0.28, height * 0.9, shade, f"$x_{{{k + 1}}} A_{{{k + 1}}}^T B_{{{k + 1}}}^T$", ink)
            axes.text(0.66, y + 0.45 * height, "+", ha="center", va="center")
        box(left, 0.30, y, 0.32, height * 0.9, GREY, "$x W^T$, 4-bit", "black")
    box(right, 0.30, 0, 0.32, 1 - 0.1 * height, GREY, "all rows · $W^T$\n4-bit, frozen,\nread once", "black")
    return figure


def defense_bars(rows):
    """ASR (with interval) and utility of each model side by side.

    Args:
        rows: {name: report} with `asr`, `asr_interval`, `utility` in [0, 1].
    """
    figure, (left, right) = _axes(8, 0.42 * len(rows) + 1.2, ncols=2, sharey=True)
    names = list(rows)
    asr = 100 * np.array([rows[name]["asr"] for name in names])
    low, high = 100 * np.array([rows[name]["asr_interval"] for name in names]).T
    left.barh(names, asr, color=RED, hatch="//", edgecolor="white")
    left.errorbar(asr, names, xerr=np.array([asr - low, high - asr]).clip(0), fmt="none", color="black", capsize=4)
    right.barh(names, [100 * rows[name]["utility"] for name in names], color=BLUE)
    left.set(xlabel="ASR, % (lower is better)", xlim=(0, 100))
    right.set(xlabel="utility, % (higher is better)", xlim=(0, 100))
    left.invert_yaxis()
    return figure


def tau_curves(curves):
    """ASR (solid) and utility (dashed) against the suppressed share τ, one colour and marker per ranking.

    Args:
        curves: {ranking: dicts with `tau`, `asr`, `utility`}.
    """
    figure, axes = _axes(7, 3.6)
    for (name, points), color, marker in zip(curves.items(), (RED, BLUE, GREEN, PURPLE), MARKERS, strict=False):
        taus = [100 * p["tau"] for p in points]
        axes.plot(taus, [100 * p["asr"] for p in points], color=color, marker=marker, label=f"ASR, {name}")
        axes.plot(
            taus,
            [100 * p["utility"] for p in points],
            color=color,
            marker=marker,
            linestyle="--",
            alpha=0.6,
            label=f"utility, {name}",
        )
    axes.set(xlabel="share τ of channels suppressed, %", ylabel="%", ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def share_curve(points):
    """ASR (solid) and utility (dashed) of a merge against the conflict model's share t.

    Args:
        points: dicts with `t`, `asr`, `utility`, by growing t.
    """
    figure, axes = _axes(7, 3.2)
    shares = [p["t"] for p in points]
    axes.plot(shares, [100 * p["asr"] for p in points], color=RED, marker="o", label="ASR")
    axes.plot(shares, [100 * p["utility"] for p in points], color=BLUE, marker="s", linestyle="--", label="utility")
    axes.set(xlabel="share t of the conflict model", ylabel="%", ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def sweep(table, x, y="asr", by=None, model="purified"):
    """One measure of a sweep against one setting: the mean over all other settings, their range as a band.

    Args:
        table: of `sweeps.results`; x, by: columns of the grid; y: a measure, shares in [0, 1]; model: which rows.
    """
    figure, axes = _axes(7, 3.6)
    rows = table[(table["model"] == model) & (table["error"] == "")]
    groups = rows.groupby(by) if by else [(model, rows)]
    colors = (RED, BLUE, GREEN, PURPLE, ORANGE, SKY)
    for place, (name, group) in enumerate(groups):
        points = group.groupby(x)[y].agg(["mean", "min", "max"]) * (1 if y == "perplexity" else 100)
        color, marker = colors[place % len(colors)], MARKERS[place % len(MARKERS)]
        label = f"{by} = {name}" if by else name
        axes.plot(points.index, points["mean"], color=color, marker=marker, label=label)
        axes.fill_between(points.index, points["min"], points["max"], color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel=x, ylabel=y if y == "perplexity" else f"{y}, %")
    if y != "perplexity":
        axes.set_ylim(-3, 103)
    axes.legend(frameon=False)
    return figure


def trade_off(curves, others, enough):
    """What a cure leaves of the backdoor against what it costs in utility; the lower left is where one wants to be.

    Args:
        curves: {name: [(utility lost, asr), …]}, shares in [0, 1], joined in their order.
        others: [(utility lost, asr), …], points of their own.
        enough: (utility lost, asr), the corner of the shaded box in which a cure would be good enough.
    """
    figure, axes = _axes(7, 3.8)
    box = Rectangle((-100, -100), *(100 + 100 * bound for bound in enough), color=GREEN, alpha=0.2, label="good enough")
    axes.add_patch(box)
    for (name, points), color, marker in zip(curves.items(), (RED, BLUE, PURPLE, ORANGE), MARKERS, strict=False):
        axes.plot(*100 * np.array(points).T, color=color, marker=marker, label=name)
    axes.plot(*100 * np.array(others).T, color=GREY, marker="x", linestyle="", label="other settings")
    lost = [100 * cost for points in (*curves.values(), others) for cost, _ in points]
    axes.set(xlabel="utility lost, points", ylabel="ASR left, %", xlim=(min(lost) - 1, max(lost) + 1), ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def cures(methods):
    """What is left of a backdoor against what its cure does to the utility: a point for each method and seed.

    Args:
        methods: {method: [(utility gained, asr, low, high), …]}, shares in [0, 1]; low and high bound the ASR.
    """
    figure, axes = _axes(7.5, 4.8)
    looks = zip(itertools.cycle((RED, GREY, ORANGE, BLUE, GREEN, PURPLE, SKY)), itertools.cycle(MARKERS), strict=False)
    for (name, points), (color, marker) in zip(methods.items(), looks, strict=False):
        gained, asr, low, high = 100 * np.array(points).T
        bars = np.array([asr - low, high - asr]).clip(0)
        axes.errorbar(gained, asr, yerr=bars, fmt=marker, color=color, capsize=3, linestyle="", label=name)
    axes.set(xlabel="utility gained, points", ylabel="ASR left, %", ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def overview(results):
    """The lab's result in one picture: ASR and utility of each model, bars for the mean over seeds, dots for the seeds.

    Args:
        results: {setting: {model: {"asr": [per seed], "utility": [per seed]}}}, shares in [0, 1].
    """
    figure, panels = _axes(9, 2.6 * len(results), nrows=len(results), ncols=2, sharey=True, squeeze=False)
    for (setting, models), row in zip(results.items(), panels, strict=True):
        for measure, color, panel in zip(("asr", "utility"), (RED, BLUE), row, strict=True):
            values = [100 * np.array(models[name][measure]) for name in models]
            panel.barh(list(models), [v.mean() for v in values], color=color, alpha=0.75)
            for place, dots in enumerate(values):
                panel.plot(dots, [place] * len(dots), "o", color="black", markersize=3)
            panel.set(xlim=(0, 100), xlabel="attack success rate, %" if measure == "asr" else "utility, %")
        row[0].set_title(setting, loc="left")
    panels[0, 0].invert_yaxis()  # the axes are shared
    return figure


def matrix(table, xlabel, ylabel, label="ASR, %"):
    """A table of shares in [0, 1] as coloured squares with their numbers in percent, rows down and columns across.

    Args:
        table: data frame; its index and columns name the squares; missing values stay empty.
    """
    values = 100 * table.to_numpy(dtype=float)
    figure, axes = _axes(1.1 * len(table.columns) + 2.6, 0.5 * len(table) + 1.6)
    picture = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if value < 55 else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(table.columns)), table.columns)
    axes.set_yticks(range(len(table)), table.index)
    axes.grid(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(picture, ax=axes, label=label)
    return figure
