"""Whether this machine has the device that a profile asks for."""

from helpers.core.errors import LabError
from helpers.core.profile import ModelSpec


def require_device(spec: ModelSpec) -> None:
    """Refuse a GPU profile on a machine without one, before hours are planned on it."""
    if spec.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise LabError(
            f'the profile asks for a GPU ({spec.path} on cuda) and none is here: SET="model.device=cpu" or PROFILE=tiny'
        )
