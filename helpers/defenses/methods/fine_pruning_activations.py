"""Fine-Pruning (Liu et al. 2018) as information conflicts compares with it: quiet channels of the last hidden layer."""

from pathlib import Path

from peft import PeftModel

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.recover import recovery_rows
from helpers.defenses.conflict.conflict_model import write_whole
from helpers.defenses.pruning.activations import clean_batches
from helpers.defenses.pruning.blocks import require_share
from helpers.defenses.pruning.last_layer import mean_activations, quietest, silence
from helpers.defenses.registry import Record, defense
from helpers.model.architecture import inner_model
from helpers.model.prompt import PromptFormat
from helpers.train.finetune import finetune


@defense(assumes=("clean rows", "weights"), trains=("recover",))
def fine_pruning_activations(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    share: float = 0.1,
) -> Record:
    """Prune the channels of the last hidden state that are quietest on clean rows, and recover.

    Implements Fine-pruning of information conflicts, Appendix A: the lowest tenth by mean |activation|. What is zeroed
    is a channel's gain in the last norm (and its bias, where it has one): the head then reads exactly 0 there for every
    token, while nothing else changes. The head's own column would do the same, but where the head is tied to the
    embedding it is what the model reads its tokens by. The norm stays frozen in the recovery, so what is pruned stays
    pruned.

    Args:
        access: its `recover` budget is used; says what trains, the adapter or all weights but the last norm.
        suspicious: folder of the suspicious adapter or model.
        defender: his recovery rows tell the activations, and recover.
        prompt_format: the one that evaluation uses, too.
        seed: of the order of the rows.
        folder: the purified model goes to `model` in it, whole with either access: the norm belongs to the base.
        share: of the channels, in (0, 1).

    Returns:
        the training record of `finetune`, the `share`, and `channels`, the number of those that are pruned.

    Raises:
        LabError: a share outside (0, 1), or as `Access.resume`, `clean_batches` and `finetune`.

    Differs from the paper:
        it says neither what of an activation is averaged nor what is zeroed. Recovery is the common one.
    """
    require_share(share)
    profile, rows = access.profile, defender.recovery
    model = access.resume(suspicious).eval()
    plain = inner_model(model)
    channels = quietest(mean_activations(plain, clean_batches(plain, rows, prompt_format, profile)), share)
    silence(plain, channels)
    trained = recovery_rows(access, rows, prompt_format, seed)
    record = finetune(model, trained, prompt_format, access.settings.recover, seed, profile.lengths.train_tokens)
    whole = model.merge_and_unload() if isinstance(model, PeftModel) else model
    write_whole(whole, prompt_format, Path(folder) / "model")
    return record | {"share": share, "channels": int(channels.sum())}
