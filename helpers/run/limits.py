"""What a model allows: settings that it cannot follow are refused before anything is planned or trained.

A number of heads, a layer or a length is right or wrong for one model only, and the stage that first uses it may come
hours after the first training. Everything here is read off the model's config; no weight is.
"""

import functools

from transformers import PretrainedConfig

from helpers.attacks.behaviors import behavior
from helpers.attacks.registry import attack_method, require_needs
from helpers.core.errors import LabError
from helpers.core.profile import Conflict, Lengths
from helpers.core.settings import AUTO, Settings
from helpers.data.backdoor_folder import is_backdoor_folder
from helpers.data.combining import find_combination
from helpers.defenses.conflict.books import require_book
from helpers.defenses.conflict.merge import require_method
from helpers.defenses.conflict.merge.layer_plan import check_plan, stack_layers
from helpers.model.architecture import matrix_sizes, mlp_slots, positions
from helpers.model.generate import prompt_room


def check_against_model(settings: Settings, config: PretrainedConfig) -> None:
    """Refuse settings that this model cannot follow; see `Limits.check`.

    Args:
        settings: what is asked for.
        config: of the model that the settings name.

    Raises:
        LabError: such a setting.
    """
    Limits(config).check(settings)


class Limits:
    """What a model allows, for any number of settings.

    Args:
        config: of the model.
    """

    def __init__(self, config: PretrainedConfig):
        self.config = config

    def check(self, settings: Settings) -> None:
        """Refuse settings that this model cannot follow, whichever stage would be the first to use them.

        Args:
            settings: what is asked for.

        Raises:
            LabError: such a setting, its value and what the model has: lengths beyond its positions, more heads than
                there are, a share of channels that selects none, layers that are not there, an unknown way to merge, a
                plan of layers that cannot be merged, an attack whose method needs what this access or these rows do
                not give, or a book of evidence that is not installed.
        """
        _check_lengths(settings.profile.lengths, self.config)
        _check_heads(settings, self.config)
        _check_shares(settings, self._channels)
        _check_attack(settings, self.config)
        _check_merge(settings.profile.conflict, self.config)
        require_book(settings.profile.evidence.book)

    @functools.cached_property
    def _channels(self) -> list[int]:
        """How many channels each matrix has that is ranked; the model is built without storage for it."""
        sizes = matrix_sizes(self.config)
        return [sizes[slot.module][slot.side] for layer in mlp_slots(self.config) for slot in layer]


def _check_lengths(lengths: Lengths, config: PretrainedConfig) -> None:
    prompt_room(config, lengths.new_tokens)
    limit = positions(config)
    if limit is not None and lengths.train_tokens > limit:
        raise LabError(
            f"lengths.train_tokens = {lengths.train_tokens}, and this {config.model_type} has {limit} positions: set "
            f"it to {limit} or lower, longer rows are then cut"
        )


def _check_heads(settings: Settings, config: PretrainedConfig) -> None:
    cut = settings.profile.access(settings.ACCESS).suppress
    heads = config.num_attention_heads * (1 if cut.heads_of == "layer" else config.num_hidden_layers)
    if cut.heads > heads:
        which = "each layer of this model" if cut.heads_of == "layer" else "this model"
        raise LabError(
            f"{settings.ACCESS}.suppress.heads = {cut.heads}, and {which} has {heads} attention heads: set it to "
            f"{heads} or lower"
        )


def _check_shares(settings: Settings, channels: list[int]) -> None:
    """Refuse a τ that rounds to no channel at all: it suppresses nothing and cannot be told from its controls."""
    profile, access = settings.profile, settings.ACCESS
    ranked = channels if profile.signature.scope == "module" else [sum(channels)]
    shares = {f"{access}.suppress.tau": [profile.access(access).suppress.tau]}
    if settings.TAU == AUTO:
        shares[f"challenge.taus.{access}"] = getattr(profile.challenge.taus, access)
    for key, taus in shares.items():
        if not any(round(min(taus) * channels) for channels in ranked):
            raise LabError(
                f"{key} = {min(taus):g} selects none of the {max(ranked):,} channels that are ranked in this model: "
                f"set it above {0.5 / max(ranked):.2g}"
            )


def _check_attack(settings: Settings, config: PretrainedConfig) -> None:
    """Refuse what the attack's method needs and does not get, and numbers of it that the model does not have."""
    changes, own_trigger = settings.profile.attack, is_backdoor_folder(settings.DATA) if settings.DATA else False
    by = changes.by if own_trigger else settings.planted_by
    if by is None:
        return

    def one_payload() -> bool:
        return find_combination(behavior(settings.TASK, changes.model_dump()).combine).traits.replaces

    require_needs(by, settings.ATTACK, settings.ACCESS, known_trigger=not own_trigger, one_payload=one_payload)
    if check := attack_method(by).needs.check:
        check(settings.profile, config)


def _check_merge(conflict: Conflict, config: PretrainedConfig) -> None:
    """Refuse an unknown method, and a plan for passthrough of no layers, or of layers that the model does not have."""
    require_method(conflict.method)
    if conflict.method != "passthrough":
        return
    stack = stack_layers(conflict.plan)
    if not stack:
        raise LabError(
            "conflict.method = passthrough, and conflict.plan names no layers to stack: give some, such as "
            f"[{{model: conflict, first: 0, last: {config.num_hidden_layers - 1}}}]"
        )
    try:
        check_plan(stack, {"suspicious": config, "conflict": config}, conflict.ends)
    except LabError as error:
        raise LabError(f"conflict.plan: {error}") from None
