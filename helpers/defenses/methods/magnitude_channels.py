"""Smallest channels: magnitude pruning with the structure and ratio of a signature."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.cure import suppress_and_recover
from helpers.defenses.bdvax.select import select_suppressed
from helpers.defenses.pruning.magnitude import smallest_rankings
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat
from helpers.model.tokenizer import record_format


@defense(assumes=("clean rows", "weights"), trains=("recover",))
def magnitude_channels(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    recover: bool = True,
) -> Record:
    """Suppress as many channels and heads as BD-VAX would, the smallest ones. Implements Pruning of BD-VAX, §5.1.

    With adapter access the smallest updates go, with full access the smallest weights are drawn anew.

    Args:
        access: what may be edited; its `suppress` numbers say how much goes.
        suspicious: folder of the suspicious adapter or model.
        defender: his recovery rows are used where there is a recovery.
        prompt_format: the one that evaluation uses, too.
        seed: of what takes the place of weights, and of the order of the rows.
        folder: the purified adapter or model goes to `model` in it.
        recover: whether the common recovery follows. The paper's row has none, and needs no clean rows.

    Returns:
        `tau` and `heads` of what was suppressed, and the record of `recover` where there is one.

    Raises:
        LabError: as `smallest_rankings`, `select_suppressed` and `Access.suppress`.

    Differs from the paper:
        it does not say what takes the place of a pruned channel; here the same as for the signature, so that the two
        differ by the choice of channels alone.
    """
    cut, rankings = access.settings.suppress, smallest_rankings(access, suspicious)
    told = {"tau": cut.tau, "heads": cut.heads}
    if recover:
        rows = defender.recovery
        return told | suppress_and_recover(access, suspicious, *rankings, rows, prompt_format, seed, folder)
    masks, heads = select_suppressed(access, *rankings)
    access.suppress(suspicious, masks, seed, Path(folder) / "model", heads)
    record_format(Path(folder) / "model", prompt_format)
    return told
