"""The injection as a program of its own, where one process is not enough.

It makes the very stage that notebook 01 then finds made:

    accelerate launch --num_processes 4 --use_fsdp -m helpers.run.inject --profile llama-2-7b-chat --access full
"""

import argparse
import os
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory

from helpers.access import access_to
from helpers.attacks.inject import inject
from helpers.core.errors import exit_status
from helpers.core.settings import Settings
from helpers.core.slices import code_in_notebook
from helpers.model.tokenizer import load_format
from helpers.run.deal import deal
from helpers.run.execution import NOTEBOOKS
from helpers.run.start import open_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the stage `inject` of a run; every process that `accelerate launch` starts calls this."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m helpers.run.inject")
    Settings.add_options(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _make_stage(options))


def _make_stage(options):
    """Make the stage in the first process; the others take part in the training and keep nothing."""
    settings = Settings.from_options(options)
    run, attack = open_run(settings), deal(settings).attack
    prompt_format, access = load_format(settings.profile.model), access_to(settings.profile, settings.ACCESS)

    def make(folder):
        return inject(access, attack, prompt_format, settings.SEED, folder)

    code = code_in_notebook(NOTEBOOKS / "01_inject_backdoor.ipynb", "inject")  # the stage is the notebook's
    if int(os.environ.get("RANK", "0")) == 0:
        stage = run.stage("inject", make, code=code)
        print(f"{stage.path}: {stage.result['steps']} steps, mean loss {stage.result['loss']}")
    elif not run.is_made("inject", code):
        with TemporaryDirectory() as elsewhere:
            make(elsewhere)


if __name__ == "__main__":
    sys.exit(main())
