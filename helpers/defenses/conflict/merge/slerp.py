"""The arc between two models as whole vectors (Eq. 10)."""

from helpers.defenses.conflict.merge.arc import along_the_arc, inner_products
from helpers.defenses.conflict.merge.checks import check_different, check_share
from helpers.defenses.conflict.merge.registry import method
from helpers.defenses.conflict.merge.streaming import ModelStream
from helpers.model.shards import Folder


@method
def slerp(suspicious: Folder, conflict: Folder, folder: Folder, t: float) -> None:
    """Write the point at share t of the arc from θ̃ to θ̂. Implements Eq. (10), information conflicts §3.3.

    φ is the angle between the two models, each taken as one vector of all its weights; it costs a pass of its own.
    Nearly parallel vectors (|cos φ| > 0.9995) have no arc worth the name and are combined linearly, as in mergekit;
    models trained from one base nearly always are, so that this is then `linear`.

    Args:
        suspicious, conflict, folder: as in `linear`.
        t: the conflict model's share of the arc, 0 to 1.

    Raises:
        LabError: as `linear`, and for equal models.
    """
    check_share(t)
    models = ModelStream([suspicious, conflict], folder)
    check_different(suspicious, conflict)
    products = sum(inner_products(ours, theirs) for ours, theirs in models.weights())
    models.write_blocks(along_the_arc(t, products))
