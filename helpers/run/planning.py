"""What a run will cost, told before it starts: memory, disk, arithmetic and time of every stage.

Only the checkpoint's config is read; the model is built without storage. What no config tells is measured here in
seconds (what the libraries take, how fast this machine multiplies, how long the rows are) or named as an assumption.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from helpers.access import access_to
from helpers.core.settings import Settings
from helpers.run.costs import TRAINED, Cost, Rows, Shape, costs, known_config, rows, shape
from helpers.run.limits import check_against_model
from helpers.run.machine import Machine, this_machine
from helpers.train.precision import STORING_LOSS

UTILISATION = {"cpu": 0.5, "cuda": 0.35}  # share of the machine's multiplication speed that these stages reach
MEASURED = {  # what the memory of stages was measured on, its weights, and how the plan stands to it
    "cpu": ("the lab's small model", 4_065_408, "an upper bound of"),  # how much of its heap a C library keeps varies
    "cuda": ("the shape of LLaMA-2-7B on one H200", 6_738_415_616, "within 15 % of"),
}
ROOM = 0.95  # share of the free memory that a stage may fill
REMEDIES = (
    "model.checkpointing=true",
    "lengths.at_once=1024",
    "{access}.inject.batch_size=1",
    "{access}.recover.batch_size=1",
    "evaluation.batch_size=4",
    "model.dtype=bfloat16",
)


def fits(cost: Cost, machine: Machine) -> bool:
    """Whether a stage stays inside the free memory."""
    return machine.free is not None and machine.libraries + cost.memory <= ROOM * machine.free


def remedy(settings: Settings, machine: Machine, model: Shape, row: Rows) -> str:
    """The first settings, taken together in the order of `REMEDIES`, under which every stage fits; "" for none."""
    if machine.free is None:
        return ""
    chosen: dict[str, Any] = {}
    for text in REMEDIES:
        key, _, value = text.format(access=settings.ACCESS).partition("=")
        chosen[key] = {"true": True}.get(value, int(value) if value.isdigit() else value)
        changed = Settings.checked(settings.model_dump() | {"OVERRIDES": settings.OVERRIDES | chosen})
        if all(fits(cost, machine) for cost in costs(changed, model, row)):
            return " ".join(f"{key}={str(value).lower()}" for key, value in chosen.items())
    return ""


def plan_lines(settings: Settings) -> Iterator[str]:
    """The plan as lines of text.

    Raises:
        LabError: as `shape` and `rows`, or settings that the model cannot follow, see `check_against_model`.
    """
    profile, model = settings.profile, shape(settings.profile)
    check_against_model(settings, known_config(profile.model))
    row = rows(settings)
    machine, access = this_machine(settings), access_to(profile, settings.ACCESS)
    suppress = access.settings.suppress
    cut = suppress.heads * (model.layers if suppress.heads_of == "layer" else 1)
    half, quarter = _size(model.weights("bfloat16")), _size(model.weights("bfloat16", four_bit=True))
    yield (
        f"{profile.name}, {settings.ACCESS} access: {model.parameters / 1e6:,.1f} million weights, "
        f"{model.layers} layers; {half} in 16 bits, {quarter} in 4"
    )
    yield (
        f"one adapter: {model.adapter / 1e6:,.2f} million numbers, {_size(4 * model.adapter)}; to suppress: "
        f"{round(suppress.tau * model.inner):,} of {model.inner:,} channels in each layer"
        + (f", {cut} of {model.layers * model.heads} heads" if cut else "")
    )
    if access.edits_weights and profile.model.dtype != "float32":
        yield (
            f"all weights train in 32 bits, {_size(TRAINED * model.parameters)} with gradient and moments; the model "
            f"is stored in {_size(4 * model.parameters)} where 16 bits would lose over {STORING_LOSS:.0%} of the change"
        )
    source = "counted" if row.counted else "assumed, the tokenizer is not here"
    yield f"rows: {row.mean:.0f} tokens in the mean, at most {row.longest:.0f} ({source})"
    free = "" if machine.free is None else f", {_size(machine.free)} free, {machine.speed / 1e9:,.0f} GFLOP/s"
    yield f"machine: {machine.name}{free}; the libraries themselves take {_size(machine.libraries)}"
    yield ""
    head = ("stage", "times", "peak memory", "base 16-bit", "base 4-bit", "disk", "TFLOP", "time", "")
    planned = costs(settings, model, row)
    lines = [head, *(_line(cost, machine, profile.model.runs_on) for cost in planned)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for stage, *numbers in lines:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        yield "  ".join([stage.ljust(widths[0]), *cells]).rstrip()
    yield ""
    yield vouched(profile.model.runs_on, model)
    yield verdict(settings, planned, machine, model, row)


def vouched(device: str, model: Shape) -> str:
    """One line: whether the memory of such a model on such a device was measured, or is predicted from another.

    Args:
        device: "cpu" or "cuda".
        model: its sizes.
    """
    name, weights, bound = MEASURED[device]
    if model.parameters == weights:
        return f"memory: {bound} what was measured ({name}); times: predicted from the speed of this machine"
    return f"memory and times are predicted and were not measured for such a model; what was measured: {name}"


def verdict(settings: Settings, planned: Sequence[Cost], machine: Machine, model: Shape, row: Rows) -> str:
    """One line: it fits, or what to try."""
    peak = machine.libraries + max(cost.memory for cost in planned)
    disk = f"disk: {_size(sum(cost.disk for cost in planned))}"
    if machine.free is None:
        return f"does not fit: no GPU here; a card with {math.ceil(peak / ROOM / 1e9)} GB would do; {disk}"
    if all(fits(cost, machine) for cost in planned):
        return f"fits: at most {_size(peak)} of {_size(machine.free)}; {disk}"
    if found := remedy(settings, machine, model, row):
        return f'does not fit: {_size(peak)} of {_size(machine.free)}; try SET="{found}"'
    other = "ACCESS=adapter, or " if access_to(settings.profile, settings.ACCESS).edits_weights else ""
    return f"does not fit: {_size(peak)} of {_size(machine.free)}; try {other}a smaller model or a larger machine"


def _line(cost: Cost, machine: Machine, device: str) -> tuple[str, ...]:
    memory = (cost.memory, cost.in_16_bit, cost.in_4_bit)
    seconds = None if machine.speed is None else cost.flops / machine.speed / UTILISATION[device]
    return (
        cost.stage,
        str(cost.times),
        *("–" if size is None else _size(machine.libraries + size) for size in memory),
        _size(cost.disk),
        f"{cost.flops / 1e12:,.2f}",
        "–" if seconds is None else _duration(seconds),
        "" if machine.free is None else "fits" if fits(cost, machine) else "DOES NOT FIT",
    )


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
