"""Dealing the rows of a run, once and disjointly: to the attacker, to the defender, and to whoever examines both."""

from helpers.data.backdoor_folder import is_backdoor_folder
from helpers.run.deal.benchmark import deal_benchmark
from helpers.run.deal.generated import deal_generated
from helpers.run.deal.instruction import deal_instruction_rows


def deal(config):
    """Every row that a run will ever use, split once and disjoint where the papers ask for it.

    Args:
        config: `Run.config`: attack, task, access, seed, data and the profile.

    Returns:
        `data.roles.RunData`.

    Raises:
        LabError: an attack, task or source that is not there, or too few rows for N variants.
    """
    if not config["data"]["path"]:
        return deal_generated(config)
    if is_backdoor_folder(config["data"]["path"]):
        return deal_benchmark(config)
    return deal_instruction_rows(config)
