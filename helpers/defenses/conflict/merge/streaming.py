"""Models that are merged from disk to disk: of each, one tensor at a time is read."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from helpers.core.disk import whole_or_nothing
from helpers.defenses.conflict.merge.blocks import Combine, map_blocks
from helpers.defenses.conflict.merge.checkpoints import copy_beside, merged_files, merged_names, read_finite
from helpers.defenses.conflict.merge.checks import check_alike
from helpers.model.shards import Folder, write


class ModelStream:
    """Models of one shape, read side by side, and the folder that their merge is written to.

    The merged model has the names, files, dtypes, config and tokenizer of the first; what holds no weights, a mask or
    a counter, is the first one's, too.

    Args:
        models: folders of whole models.
        folder: the one to write to.

    Raises:
        LabError: models that cannot be merged.
    """

    def __init__(self, models: Sequence[Folder], folder: Folder):
        check_alike(models, folder)
        self.models, self.folder = models, folder

    def weights(self) -> Iterator[list[Tensor]]:
        """Each tensor of weights in the first model, and its like in the others.

        Raises:
            LabError: a number that is NaN or infinite, as the writers below do.
        """
        for name in merged_names(self.models[0]):
            tensors = self._read(name)
            if tensors[0].is_floating_point():
                yield tensors

    def write_blocks(self, combine: Combine) -> None:
        """Write the model whose numbers are `combine(*blocks)`, of one float32 block of each model."""
        self.write_tensors(lambda *tensors: map_blocks(combine, *tensors))

    def write_tensors(self, combine: Combine) -> None:
        """Write the model whose tensors are `combine(*tensors)`, for what has to see a tensor whole; see `map_blocks`.

        When it fails, nothing is left on the disk.
        """

        def merged(name: str) -> Tensor:
            tensors = self._read(name)
            return combine(*tensors) if tensors[0].is_floating_point() else tensors[0]

        with whole_or_nothing(self.folder) as partial:
            write(partial, merged_files(self.models[0]), merged)
            copy_beside(self.models[0], partial)

    def _read(self, name: str) -> list[Tensor]:
        """One tensor of each model."""
        return [read_finite(model, name) for model in self.models]
