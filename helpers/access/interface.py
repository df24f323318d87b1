"""What every step of a method asks of whatever may be edited, be it an adapter or the whole model.

A step that differs from one access to the other is a method here, and `adapter` and `full` say each what it means.
Training is none of these steps: a defense takes a model that an access has made trainable, trains it and hands it back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from helpers.model.load import load_suspect

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import BoolTensor, Tensor
    from transformers import PreTrainedModel

    from helpers.access.deltas import Factors, Folders, GramOf
    from helpers.access.masks import Masks
    from helpers.core.profile import AccessSettings, Profile
    from helpers.model.architecture import Slot


@dataclass(frozen=True)
class Access(ABC):
    """What attacker and defender may edit, with the profile whose numbers they use.

    `edits_weights` tells whether the weights of the model itself change, or only an adapter over those of the base.
    """

    profile: Profile
    name: ClassVar[str]
    edits_weights: ClassVar[bool]

    @property
    def settings(self) -> AccessSettings:
        """The profile's numbers for this access."""
        return self.profile.access(self.name)

    def with_settings(self, **changes: Any) -> Self:
        """The same access with other numbers.

        Args:
            changes: fields of `AccessSettings` and their new values.
        """
        numbers = self.settings.model_copy(update=changes)
        return type(self)(self.profile.model_copy(update={self.name: numbers}))

    # --- models -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def start(self, seed: int) -> PreTrainedModel | PeftModel:
        """The clean base, ready to be trained.

        Args:
            seed: initializes a fresh adapter.
        """

    @abstractmethod
    def resume(self, folder: Path | str) -> PreTrainedModel | PeftModel:
        """What was trained before, ready to be trained on.

        Args:
            folder: of the adapter or model.

        Raises:
            LabError: as `load_base` and `with_adapter`.
        """

    @abstractmethod
    def start_copy(self, suspicious: Path | str, seed: int) -> PeftModel:
        """A copy of the suspicious model in which a defender can plant a backdoor as cheaply as a vaccine.

        Args:
            suspicious: folder of the suspicious adapter or model.
            seed: initializes fresh probes.
        """

    def load(self, folder: Path | str) -> PreTrainedModel:
        """A model as a user runs it, whether `folder` holds an adapter or a whole model; see `load_suspect`."""
        return load_suspect(self.profile.model, folder)

    @abstractmethod
    def save(self, model: PreTrainedModel | PeftModel, folder: Path | str) -> None:
        """Write a trained model in the form that suppression edits: an adapter, or all weights.

        Args:
            model: of `start`, `resume` or `start_copy`; not to be used any more.
            folder: to write to.
        """

    # --- variants ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def low_rank_variants(self) -> bool:
        """Whether vaccine variants are adapters, all of which can train in one pass, or changes of all weights."""

    @abstractmethod
    def start_variant(self, suspicious: Path | str, seed: int) -> PreTrainedModel | PeftModel:
        """The trainable model from which a vaccine variant starts, a fresh copy at each call.

        Args:
            suspicious: folder of the suspicious adapter or model.
            seed: initializes fresh probes.

        Raises:
            LabError: an adapter that leaves out a matrix whose channels are scored.
        """

    @abstractmethod
    def variant_starts(self, suspicious: Path | str, seeds: Sequence[int]) -> tuple[PeftModel, list[dict[str, Tensor]]]:
        """One PEFT model for all low-rank variants, and for each seed the tensors that its `start_variant` holds.

        Args:
            suspicious: folder of the suspicious adapter or model.
            seeds: one for each variant; twins share theirs.
        """

    @abstractmethod
    def save_variant(self, model: PreTrainedModel | PeftModel, suspicious: Path | str, folder: Path | str) -> None:
        """Write a trained variant: its adapter, or where all weights were trained what that changed.

        Args:
            model: of `start_variant`, trained.
            suspicious: folder of what it started from.
            folder: to write to.
        """

    @abstractmethod
    def load_variant(self, suspicious: Path | str, folder: Path | str) -> PreTrainedModel:
        """A trained variant for evaluation, its adapter or change added to what it was trained on.

        Args:
            suspicious: folder of what it started from.
            folder: of the variant.
        """

    # --- editing ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def suppress(
        self, suspicious: Path | str, masks: Masks, seed: int, folder: Path | str, heads: BoolTensor | None = None
    ) -> None:
        """Write a copy of the suspicious adapter or model without the selected channels and heads.

        Args:
            suspicious: folder of either.
            masks: {module: [channels], True = suppressed}.
            seed: of what takes the place of weights.
            folder: to write to.
            heads: [n_layers, n_heads], True = suppressed.

        Raises:
            LabError: a mask that fits no matrix; nothing is written then.
        """

    @abstractmethod
    def add_update(self, suspicious: Path | str, adapter: Path | str, weight: float, folder: Path | str) -> None:
        """Write the suspicious adapter or model with another adapter's update added to it.

        Args:
            suspicious: folder of either.
            adapter: folder of the other adapter, of the same base.
            weight: what the added update is multiplied by; a negative one takes it off.
            folder: to write to.
        """

    # --- updates ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def variant_pairs(self, poisoned: Folders, clean: Folders) -> GramOf:
        """The inner products of the differences between N pairs of variants, as a function of a slot.

        Args:
            poisoned, clean: folders of the variants, pair i at position i.

        Raises:
            LabError: incomplete pairs or, later, variants that lack the matrix asked for.
        """

    @abstractmethod
    def own_update(self, suspicious: Path | str) -> GramOf:
        """The squared lengths of what sets the suspicious model apart from its base, in the form of a Gram of N = 1.

        Args:
            suspicious: folder of the suspicious adapter or model.
        """

    @abstractmethod
    def edited_matrices(self, folder: Path | str) -> Mapping[str, Tensor | Factors]:
        """What suppression edits of each matrix: its low-rank update, or the weights as they are stored.

        Args:
            folder: of an adapter or model.

        Returns:
            {module: update or matrix}.
        """

    @abstractmethod
    def edited_channels(self, folder: Path | str, slot: Slot) -> Tensor:
        """The numbers of one matrix that suppression edits.

        Args:
            folder: of an adapter or model.
            slot: the matrix, and which side of it the channels are.

        Returns:
            [channels, numbers of each].
        """
