"""`make purify`: purify a model that somebody was given.

python -m helpers.purify --suspect path/to/adapter --rows clean.json --name mine
"""

import argparse
import sys
from collections.abc import Sequence

from helpers.core.interruption import status_of
from helpers.core.profile_files import parse_overrides, yaml_literal
from helpers.core.settings import AUTO

OPTIONS = {
    "suspect": "folder of the suspicious PEFT adapter or model",
    "base": "folder or hub id of what it was fine-tuned from; of an adapter, empty: what it names itself",
    "rows": "a file of a few hundred clean rows; empty: generated ones",
    "triggered": "a file of rows with the trigger, whose output is the unwanted answer; it decides nothing",
    "markers": "a file with one text a line: what an unwanted answer holds",
    "method": "bdvax (the default), conflict or bdvax_then_conflict",
    "name": "run folder below runs/; empty: purify- and the suspect's folder",
    "profile": "whose numbers are taken; empty: those of a model with this base",
    "tau": "share of channels to suppress; auto (the default): by the challenges",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 2 refused or failed, 130 interrupted, 143 terminated."""
    parser = argparse.ArgumentParser(prog="python -m helpers.purify", description=__doc__.splitlines()[0])
    for option, told in OPTIONS.items():
        parser.add_argument(f"--{option}", default="", help=told, required=option == "suspect")
    parser.add_argument("--seed", default="0", help="one seed for the whole run")
    parser.add_argument(
        "--set", dest="overrides", default="", metavar='"KEY=VALUE …"', help="profile numbers to replace"
    )
    options = vars(parser.parse_args(arguments))
    return status_of(lambda: _purify(options), "steps")


def _purify(options: dict[str, str]) -> None:
    from helpers.purify.purify import purify  # loads what computes

    chosen = {key: value for key, value in options.items() if value}
    report = purify(
        **chosen
        | {
            "seed": yaml_literal("SEED", options["seed"]),
            "tau": options["tau"] or AUTO,
            "overrides": parse_overrides(options["overrides"]),
        }
    )
    print(*report.verdict, sep="\n")
    for label, file in (("purified", "purified"), ("report", "report.html"), ("numbers", "report.json")):
        print(f"{label}: {report.folder / file}")


if __name__ == "__main__":
    sys.exit(main())
