"""Defenses that decode differently: what they write beside their model, and how both are loaded again.

Such a defense writes the model that answers, whole, to `model`, and `decoding.json` beside it: by whom the decoding
comes, its numbers, and the folder of a second model where it has one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import LogitsProcessorList, PreTrainedModel

from helpers.access import Access
from helpers.core.disk import read_json, write_json
from helpers.core.errors import LabError, nearest
from helpers.defenses.conflict.wordnet import require_wordnet, with_glosses
from helpers.defenses.decoders.suspicion import SuspicionCheck
from helpers.model.decoding import Decoding, Inputs

DECODING = "decoding.json"


def write_decoding(folder: Path | str, by: str, second: str = "", **numbers: Any) -> None:
    """Write beside a defended model how it decodes.

    Args:
        folder: of the defense; its model lies in `model`.
        by: a key of `DECODERS`.
        second: name of the second model's folder inside of `folder`; "" for none.
        numbers: what the decoder takes beyond.
    """
    write_json(Path(folder) / DECODING, {"by": by, "second": second, "numbers": numbers})


def load_defended(access: Access, folder: Path | str) -> tuple[PreTrainedModel, Decoding | None]:
    """What a defense has left: the model, and how it decodes.

    Args:
        access: as the defense got it.
        folder: of the defense; its model lies in `model`, `decoding.json` beside it where it decodes differently.

    Returns:
        the model as a user runs it, and its decoding; None where that is plain greedy decoding.

    Raises:
        LabError: an unknown decoding, or as `Access.load`.
    """
    place = Path(folder)
    model = access.load(place / "model")
    if not (place / DECODING).is_file():
        return model, None
    told = read_json(place / DECODING)
    if told["by"] not in DECODERS:
        raise LabError(f"{place / DECODING}: decoding '{told['by']}' is unknown{nearest(told['by'], DECODERS)}")
    second = access.load(place / told["second"]) if told["second"] else None
    return model, DECODERS[told["by"]](second, **told["numbers"])


def check_suspicion(reference: PreTrainedModel, alpha: float) -> Decoding:
    """CleanGen: tokens that a reference model finds unlikely are replaced; see `SuspicionCheck`.

    For greedy decoding only: what is checked is the token that the target prefers, and a drawn one need not be it.
    """

    def processors(inputs: Inputs) -> dict[str, Any]:
        return {"logits_processor": LogitsProcessorList([SuspicionCheck(reference, inputs["attention_mask"], alpha)])}

    return Decoding(f"CleanGen (α = {alpha:g})", processors, reference, greedy_only=True)


def draft_and_verify(drafter: PreTrainedModel, verifier: str) -> Decoding:
    """Speculative decoding by transformers: one model drafts, the loaded one verifies.

    Drawn answers are not judged: they have the verifier's own distribution, whatever was drafted.
    """
    title = f"speculative decoding, verified by the {verifier} model"
    return Decoding(title, lambda inputs: {"assistant_model": drafter}, drafter, one_by_one=True, greedy_only=True)


def explain_words(second: None, words: int, max_words: int) -> Decoding:
    """LETHE's evidence: every prompt carries what WordNet says of its heaviest words; see `with_glosses`."""
    wordnet = require_wordnet()
    return Decoding(
        f"WordNet's glosses of {words} words in each prompt",
        ask=lambda example: with_glosses(example, wordnet, words, max_words),
    )


Decoder = Callable[..., Decoding]  # of a second model or None, and numbers
DECODERS: dict[str, Decoder] = {
    "cleangen": check_suspicion,
    "speculative": draft_and_verify,
    "lethe": explain_words,
}
