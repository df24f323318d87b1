"""Dealing the rows of a run, once and disjointly: to the attacker, to the defender, and to whoever examines both."""

from helpers.core.settings import Settings
from helpers.data.backdoor_folder import is_backdoor_folder
from helpers.data.roles import RunData
from helpers.run.deal.benchmark import deal_benchmark
from helpers.run.deal.generated import deal_generated
from helpers.run.deal.instruction import deal_instruction_rows


def deal(settings: Settings) -> RunData:
    """Every row that a run will ever use, split once and disjoint where the papers ask for it.

    The share τ that is suppressed decides nothing here: a run with another one has the same rows. Nor does ROWS decide
    what attacker and examiner get.

    Raises:
        LabError: an attack, task or source that is not there, too few rows for N variants, or rows of the defender that
            somebody else has as well.
    """
    if not settings.DATA:
        return deal_generated(settings)
    if is_backdoor_folder(settings.DATA):
        return deal_benchmark(settings)
    return deal_instruction_rows(settings)
