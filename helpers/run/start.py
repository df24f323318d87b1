"""Opening the run of some settings, once they are known to suit this machine and this model."""

from helpers.core.device import require_device
from helpers.core.settings import Settings
from helpers.core.store import Run, run_of
from helpers.model.checkpoint import load_config
from helpers.run.limits import check_against_model


def open_run(settings: Settings) -> Run:
    """The run folder of these settings: `runs/<name>/`, or `$LAB_RUNS/<name>/`.

    Raises:
        LabError: the profile asks for a device that this machine lacks, or for what its model cannot do, or as
        `run_folder`.
    """
    require_device(settings.profile.model)
    check_against_model(settings, load_config(settings.profile.model))
    return run_of(settings)
