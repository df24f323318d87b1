"""An arc between two models for each of their tensors (Eq. 10)."""

from torch import Tensor

from helpers.defenses.conflict.merge.arc import along_the_arc, inner_products
from helpers.defenses.conflict.merge.blocks import map_blocks
from helpers.defenses.conflict.merge.checks import check_different, check_share
from helpers.defenses.conflict.merge.registry import method
from helpers.defenses.conflict.merge.streaming import ModelStream
from helpers.model.shards import Folder


@method
def slerp_by_tensor(suspicious: Folder, conflict: Folder, folder: Folder, t: float) -> None:
    """Write, for each tensor, the point at share t of the arc from θ̃ to θ̂: Eq. (10) as mergekit computes it.

    Each tensor has an angle of its own, and near-parallel ones alone fall back to the straight line.

    Args:
        suspicious, conflict, folder, t: as in `slerp`.

    Raises:
        LabError: as `slerp`.

    Differs from the paper:
        Eq. (10) names one angle between the models; its experiments were made with mergekit.
    """
    check_share(t)
    models = ModelStream([suspicious, conflict], folder)
    check_different(suspicious, conflict)

    def on_its_arc(ours: Tensor, theirs: Tensor) -> Tensor:
        return map_blocks(along_the_arc(t, inner_products(ours, theirs)), ours, theirs)

    models.write_tensors(on_its_arc)
