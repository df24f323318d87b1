"""The attacker's work: training on clean and poisoned rows (BD-VAX §3), with a defense in mind or not, or editing.

Notebook 01 calls `inject`. Where one process is not enough, this module is also a program that makes the very stage
which the notebook then finds made:

    accelerate launch --num_processes 4 --use_fsdp -m helpers.run.inject --profile llama-2-7b-chat --access full
"""

import argparse
import os
import sys
from functools import partial
from tempfile import TemporaryDirectory

from helpers.adaptive import ADAPTIVE
from helpers.attacks.editors import EDITORS, EditSettings, edit
from helpers.attacks.layerwise import poison_layerwise
from helpers.core.errors import exit_status
from helpers.core.settings import Settings
from helpers.model.load import load_base, save
from helpers.model.lora import new_adapter
from helpers.model.tokenizer import load_format, record_format
from helpers.run.deal import deal
from helpers.run.limits import require_full_access, require_known_trigger, require_one_payload
from helpers.run.start import open_run
from helpers.train.finetune import finetune


def uses(access: str) -> list[str]:
    """The settings that decide what the injection makes, as a stage records them."""
    shared = ["attack", "task", "access", "seed", "data", "profile.model", "profile.lora", "profile.lengths"]
    planted = [f"profile.{access}.inject", f"profile.{access}.poison_rate", "profile.editing", "profile.layerwise"]
    return [*shared, *planted, "profile.adaptive"]


def inject(profile, access, attack, prompt_format, seed, folder):
    """Plant the backdoor in the base model and write the adapter ("adapter") or the model ("full") to `folder`.

    The prompt format is written beside it: measured with another one, the backdoor may seem to be gone.

    Returns:
        the record of `finetune`, `edit` or an attack of `ADAPTIVE`, and the name of the `prompt_format`.

    Raises:
        LabError: an attack by model editing with adapter access, or see `edit` and `attacks.adaptive`.
    """
    by = attack.trigger.by if attack.trigger else profile.attack.by or "training"
    plant = _edited if by in EDITORS else _adapted if by in ADAPTIVE else _trained
    record = plant(by, profile, access, attack, prompt_format, seed, folder)
    record_format(folder, prompt_format)
    return record | {"prompt_format": prompt_format.name}


def _trained(by, profile, access, attack, prompt_format, seed, folder, new_trainer=None):
    """Train on clean and poisoned rows, with a loss at early layers as well where the attack wants one."""
    model = load_base(profile.model)
    model = new_adapter(model, profile.lora, seed) if access == "adapter" else model.requires_grad_(True)
    train = partial(finetune, new_trainer=new_trainer)
    if by == "layerwise":
        train = partial(poison_layerwise, **profile.layerwise.model_dump())
    rows, budget = attack.clean + attack.poisoned, profile.access(access).inject
    lengths = profile.lengths
    return train(model, rows, prompt_format, budget, seed, lengths.train_tokens, description="injection", folder=folder)


def _adapted(by, profile, access, attack, prompt_format, seed, folder):
    """Plant as an attacker does who knows a defense; the planting itself is the usual training."""
    plant = partial(_trained, "training", profile, access, attack, prompt_format, seed)
    return ADAPTIVE[by](plant, profile, access, attack, prompt_format, seed, folder)


def _edited(by, profile, access, attack, prompt_format, seed, folder):
    """Edit a few matrices, from clean rows whose right answer is another one than the payload."""
    require_known_trigger(by, attack.trigger is not None)
    require_full_access(attack.trigger.name, access)
    payloads = {row.output for row in attack.poisoned}
    require_one_payload(attack.trigger.name, len(payloads) == 1)
    (payload,) = payloads
    numbers = profile.editing.model_dump()
    chosen = [row for row in attack.clean[: len(attack.poisoned)] if row.output != payload]
    rows = chosen[: numbers.pop("rows")]
    model = load_base(profile.model)
    record = edit(model, prompt_format, rows, attack.trigger, payload, EditSettings(by, seed=seed, **numbers))
    save(model, folder)
    return record | {"steps": 0}


def main(arguments=None):
    """Make the stage `inject` of a run; every process that `accelerate launch` starts calls this."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m helpers.run.inject")
    Settings.add_options(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _make_stage(options))


def _make_stage(options):
    """Make the stage in the first process; the others take part in the training and keep nothing."""
    settings = Settings.from_options(options)
    run, attack = open_run(settings), deal(settings).attack
    prompt_format = load_format(settings.profile.model)

    def make(folder):
        return inject(settings.profile, settings.ACCESS, attack, prompt_format, settings.SEED, folder)

    if int(os.environ.get("RANK", "0")) == 0:
        stage = run.stage("inject", make, uses=uses(settings.ACCESS))
        print(f"{stage.path}: {stage.result['steps']} steps, mean loss {stage.result['loss']}")
    elif not run.is_made("inject", uses(settings.ACCESS)):
        with TemporaryDirectory() as elsewhere:
            make(elsewhere)


if __name__ == "__main__":
    sys.exit(main())
