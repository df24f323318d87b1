"""The rows of the arena, run one after the other on one suspicious model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from helpers.access import Access
from helpers.attacks.behaviors import behavior
from helpers.core.arena import REFUSED, ArenaRow
from helpers.core.errors import LabError, nearest
from helpers.core.settings import Settings
from helpers.core.store import Run, Stage
from helpers.data.roles import RunData
from helpers.defenses.own import any_defense
from helpers.defenses.registry import PARAMETERS, Defense
from helpers.model.prompt import PromptFormat
from helpers.run.arena.defend import defend
from helpers.run.arena.measure import measure
from helpers.run.arena.outcomes import Outcome, outcome
from helpers.run.arena.refusals import forget, is_outdated

TRIGGER = "trigger"  # a parameter that oracles alone have


@dataclass(frozen=True)
class Arena:
    """One suspicious model, and all that its defenses are given.

    Args:
        run: whose stage `inject` is the suspicious model.
        access: what may be edited.
        data: every row of the run; a defense gets the defender's alone.
        prompt_format: the one that the model was trained in.
        settings: SEED, TASK and the chosen rows.
    """

    run: Run
    access: Access
    data: RunData
    prompt_format: PromptFormat
    settings: Settings

    def run_all(self) -> dict[str, Outcome]:
        """Every chosen row, by its name, in the order of the table; see `require_numbers` and `run_row`."""
        require_numbers(self.settings.rows)
        return {row.name: self.run_row(row) for row in self.settings.rows}

    def run_row(self, row: ArenaRow) -> Outcome:
        """Defend by one row and measure what is left: the stages `arena/<name>` and `evaluate/arena/<name>`.

        Args:
            row: one of the chosen ones.

        Returns:
            what came of it; a defense that refuses is an outcome and no error.
        """
        defense, suspicious = any_defense(row.by), self.run.need("inject").path
        given = (self.access, suspicious, self.data.defender, self.prompt_format, self.settings.SEED)
        numbers = self.guesses(defense) | row.numbers_with(self.settings.ACCESS)
        defended = self.stage(f"arena/{row.name}", partial(defend, defense, *given, numbers, self.knowledge(defense)))
        if REFUSED in defended.result:
            return outcome(row.title, defended, None)
        looked = partial(measure, self.access, defended.path, self.prompt_format, self.data.test)
        return outcome(row.title, defended, self.stage(f"evaluate/arena/{row.name}", looked))

    def stage(self, name: str, make: Callable[[Path], dict[str, Any]]) -> Stage:
        """A stage of the run; one that lacked something on this machine when it was stored is made anew."""
        made = self.run.stage(name, make)
        if is_outdated(made):
            forget(made)
            made = self.run.stage(name, make)
        return made

    def knowledge(self, defense: Defense) -> dict[str, Any]:
        """What an oracle is told of the attack.

        Args:
            defense: its parameter `trigger` asks for the planted one, None where the rows brought their own.
        """
        return {TRIGGER: self.data.attack.trigger} if TRIGGER in signature(defense).parameters else {}

    def guesses(self, defense: Defense) -> dict[str, str]:
        """What a defender has to guess of the attack, where a defense asks for it: here he guesses right.

        Args:
            defense: its parameters `unwanted` (what the model should not say) and `kind` (the family of vaccines) are
                such guesses.
        """
        task = behavior(self.settings.TASK, self.settings.profile.attack.model_dump())
        known = {"unwanted": task.payload, "kind": task.vaccines}
        return {name: guess for name, guess in known.items() if name in signature(defense).parameters}


def require_numbers(rows: Iterable[ArenaRow]) -> None:
    """Refuse rows with numbers that their defense does not take.

    Raises:
        LabError: such a row, with the nearest number that there is; or as `any_defense`.
    """
    for row in rows:
        known = [name for name in signature(any_defense(row.by)).parameters if name not in (*PARAMETERS, TRIGGER)]
        for name in row.numbers:
            if name not in known:
                raise LabError(
                    f"the row '{row.name}' sets {name}, which {row.by} does not take"
                    + (nearest(name, known) if known else "; it has no numbers")
                )
