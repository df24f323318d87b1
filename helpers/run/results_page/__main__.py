"""The command that writes the page: `python -m helpers.run.results_page`, or `make results`."""

import sys

from helpers.core.errors import exit_status
from helpers.run.results_page.page import write_page


def main() -> int:
    """Write `docs/results.md` from the recorded results; returns the exit status."""
    return exit_status(lambda: print(write_page()))


if __name__ == "__main__":
    sys.exit(main())
