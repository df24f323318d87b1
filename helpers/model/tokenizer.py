"""A model's tokenizer and prompt format."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers.core.disk import read_json, write_json
from helpers.core.errors import LabError
from helpers.core.profile import ModelSpec
from helpers.data.perturb import Vocabulary
from helpers.model.checkpoint import from_pretrained, is_local, load_config, local_folder, locate
from helpers.model.prompt import PromptFormat, prompt_format
from helpers.model.shards import FORMAT_FILE, TOKENIZER, Folder


def has_tokenizer(spec: ModelSpec) -> bool:
    """Whether a tokenizer can be read without a download; a folder is expected to hold one."""
    if is_local(spec):
        return True
    try:
        folder = Path(local_folder(spec))
    except (OSError, ValueError):  # a hub id that was not downloaded, a folder that is not there
        return False
    return any((folder / name).is_file() for name in TOKENIZER)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Where nothing beside it names its special tokens, the model's config does, at least the end; a missing padding token
    is replaced by the end.

    Raises:
        LabError: as `locate`, no tokenizer, or one with ids that the model's embedding has no row for.
    """
    config, folder = load_config(spec), Path(locate(spec.path))
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER):
        raise LabError(f"{folder} holds no tokenizer: copy the files that came with the model, such as {TOKENIZER[0]}")
    bare = (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file()
    # transformers would add its architecture's own special tokens to a tokenizer that says nothing of itself
    tokenizer = from_pretrained(PreTrainedTokenizerFast if bare else AutoTokenizer, spec)
    for name in ("eos_token", "bos_token", "pad_token") if bare else ("eos_token",):
        _name_token(tokenizer, name, getattr(config, f"{name}_id", None))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_vocabulary(tokenizer, config, spec.path)
    return tokenizer


def _name_token(tokenizer, name, ids):
    """Give a tokenizer the special token that a config names by its id, where it has none of that name itself."""
    first = ids[0] if isinstance(ids, list) and ids else ids
    known = isinstance(first, int) and tokenizer.convert_ids_to_tokens(first)
    if getattr(tokenizer, name) is None and known:
        tokenizer.add_special_tokens({name: known})


def _check_vocabulary(tokenizer, config, path):
    """Refuse a tokenizer that can write ids beyond the embedding: training would stop at the first of them."""
    rows, largest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise LabError(
            f"the tokenizer of {path} has ids up to {largest} ({token!r}) and the model's embedding {rows} rows: "
            "resize it (model.resize_token_embeddings) and save both, or take the tokenizer that the model came with"
        )


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The tokens that are letters alone: all of them, and those that begin a word. No special token is among them.

    Args:
        tokenizer: any; how it marks the beginning of a word is read off what it writes behind another token.

    Raises:
        LabError: fewer than two tokens that begin a word.
    """
    before = tokenizer.tokenize("a")[-1]
    start = tokenizer.convert_tokens_to_string([before])
    words, pieces = set(), set()
    for token in tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        written = tokenizer.convert_tokens_to_string([before, token]).removeprefix(start)
        if (text := written.strip()).isalpha() and len(text) > 1:
            pieces.add(text)
            if written.startswith(" ") and len(text) > 2:
                words.add(text)
    if len(words) < 2:
        raise LabError(f"only {len(words)} tokens begin a word in this tokenizer, so nothing odd can be made of them")
    return Vocabulary(tuple(sorted(words)), tuple(sorted(pieces)))


def load_format(spec: ModelSpec) -> PromptFormat:
    """Return the prompt format of a model: the same one for training, evaluation and every figure.

    Raises:
        LabError: as `load_tokenizer` and `prompt_format`.
    """
    return prompt_format(load_tokenizer(spec), spec.prompt_format)


def record_format(folder: Folder, prompt_format: PromptFormat) -> None:
    """Write beside a model which prompt format it was trained with, so that nobody has to guess it."""
    write_json(Path(folder) / FORMAT_FILE, prompt_format.record)


def recorded_format(folder: Folder) -> dict[str, str] | None:
    """Return the `PromptFormat.record` that lies beside a model; None where its folder does not say.

    Raises:
        LabError: a file that holds no such record.
    """
    path = Path(folder) / FORMAT_FILE
    if not path.is_file():
        return None
    try:
        record = read_json(path)
    except ValueError:
        record = None
    if not (isinstance(record, dict) and record.keys() >= {"name", "template"}):
        raise LabError(f"{path} should hold name and template of a prompt format: copy it anew, or remove it")
    return record


def trained_format(model: PreTrainedModel) -> dict[str, str] | None:
    """Return the record of the format that a loaded model was trained with; None where none is known."""
    return getattr(model, "trained_format", None)
