"""The command that writes them: `python -m helpers.run.docs`, or `make docs`."""

import sys

from helpers.core.errors import exit_status
from helpers.run.docs.parts import write_parts
from helpers.run.results_page.page import write_page


def main() -> int:
    """Write the results page and the generated parts of the other pages; returns the exit status."""
    return exit_status(lambda: print(write_page(), *write_parts(), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
