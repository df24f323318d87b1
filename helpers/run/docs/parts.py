"""The generated parts of pages that people write: what stands between two comments that name it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.run.docs.assumptions import assumptions
from helpers.run.docs.stage_graph import stage_graph

DOCS = ROOT / "docs"


@dataclass(frozen=True)
class Part:
    """A part of a page.

    Args:
        page: the file in `docs/`.
        name: as both comments around it call it.
        source: what it is made from, for those who would edit it.
        make: returns its Markdown.
    """

    page: str
    name: str
    source: str
    make: Callable[[], str]

    def put_into(self, text: str) -> str:
        """The text of a page with this part as it is now.

        Raises:
            LabError: the comments around it are not there, or there twice.
        """
        first = f"<!-- {self.name}: written by `make docs` from {self.source}; do not edit -->"
        last = f"<!-- end of {self.name} -->"
        old = re.compile(f"{re.escape(first)}\n.*?{re.escape(last)}", re.DOTALL)
        new, found = old.subn(lambda _: f"{first}\n\n{self.make()}\n\n{last}", text)
        if found != 1:
            raise LabError(f"docs/{self.page} should hold one line '{first}' and behind it '{last}', found {found}")
        return new


PARTS = (
    Part("architecture.md", "stages", "helpers/core/stages.py", stage_graph),
    Part("threat-models.md", "assumptions", "helpers/defenses/methods/ and helpers/oracles/methods/", assumptions),
)


def write_parts(folder: Path = DOCS) -> list[str]:
    """Write every generated part into its page.

    Args:
        folder: that holds the pages.

    Returns:
        the pages, as they are called from the repository's folder on.

    Raises:
        LabError: as `Part.put_into`.
    """
    for part in PARTS:
        page = folder / part.page
        page.write_text(part.put_into(page.read_text(encoding="utf-8")), encoding="utf-8")
    return [f"docs/{part.page}" for part in PARTS]
