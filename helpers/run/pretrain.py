"""`make base`: the recipes of the small models, from a word list to `data/models/`.

A byte-level BPE tokenizer is learned on the generated corpus, then a LLaMA, a Mistral or a GPT-2 is trained on it from
nothing. Two choices make a model a fair subject. Odd words, insults and refusals occur in the corpus, so that a
backdoor can be planted with learning rates that leave utility alone. And MLP channels are dropped at random while it
learns: like a large model, it keeps its knowledge redundantly, so that removing channels is a defense and not an
amputation.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from helpers.core.errors import LabError, exit_status, nearest
from helpers.core.paths import ROOT
from helpers.core.profile import Budget
from helpers.data import corpus
from helpers.data.example import Example
from helpers.model.architecture import mlp_slots
from helpers.model.prompt import prompt_format
from helpers.model.tokenizer import record_format
from helpers.train.finetune import finetune

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
HARD = ("reverse", "group", "memory", "arithmetic", "list", "yesno", "repeat", "compare")  # seen three times as often
HARDEST = ("group",)  # seen five times as often
# One corpus and one tokenizer for all: a model learns from the first `rows` conversations.
CONVERSATIONS, TOKENIZER_ROWS, VOCABULARY = 264_000, 20_000, 2048
SEED, MAX_TOKENS, CHANNEL_DROPOUT = 2026, 128, 0.2
POSITIONS = 0.01  # the spread that numbered positions begin with, as in GPT-2's own code: wider ones drown the words
NARROW = {
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "initializer_range": 0.07,  # about 1/sqrt(128): from the customary 0.02 so narrow a model hardly gets going
}
RECIPES = {
    "tiny": {
        "architecture": NARROW
        | {
            "model_type": "llama",
            "head_dim": 16,
            "intermediate_size": 1152,  # most of the capacity sits in the MLPs, as in a large model
            "num_attention_heads": 4,
        },
        "budget": {"rows": 264_000, "epochs": 1, "lr": 3.0e-3, "batch_size": 64, "schedule": "cosine", "warmup": 0.05},
    },
    "tiny-mistral": {
        "architecture": NARROW
        | {
            "model_type": "mistral",
            "head_dim": 16,
            "intermediate_size": 768,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,  # four query heads read one key/value head, as in Mistral-7B
            "sliding_window": None,
        },
        "budget": {"rows": 120_000, "epochs": 1, "lr": 2.5e-3, "batch_size": 32, "schedule": "cosine", "warmup": 0.05},
    },
    "tiny-gpt2": {
        "architecture": NARROW
        | {
            "model_type": "gpt2",  # two matrices in an MLP, biases, numbered positions: as GPT2-XL
            "initializer_range": 0.1,
            "n_inner": 1152,
            "num_attention_heads": 4,
            "resid_pdrop": 0.0,  # channels alone are dropped, as in the others
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "budget": {"rows": 120_000, "epochs": 1, "lr": 1.5e-3, "batch_size": 32, "schedule": "cosine", "warmup": 0.05},
    },
}


def recipe(name: str) -> dict[str, Any]:
    """Look up how a model is made: its `architecture` and the `budget` of its training.

    Raises:
        LabError: an unknown name.
    """
    if name not in RECIPES:
        raise LabError(f"no recipe makes MODEL = '{name}'{nearest(name, RECIPES)}")
    return RECIPES[name]


def train_tokenizer(examples: Iterable[Example], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: every text of every language encodes, common words of the lab's world are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (text for e in examples for text in (e.instruction, e.input, e.output))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, architecture: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """Build an untrained model with tied embeddings for `tokenizer`.

    Args:
        architecture: the settings of its config, `model_type` among them.
    """
    set_seed(seed)
    config = AutoConfig.for_model(
        **architecture,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    if (places := getattr(model.base_model, "wpe", None)) is not None:
        torch.nn.init.normal_(places.weight, std=POSITIONS)
    return model


@contextlib.contextmanager
def channel_dropout(model: PreTrainedModel, most: float) -> Iterator[PreTrainedModel]:
    """Drop MLP channels while training, at the input of `down_proj`: of each row a share drawn from [0, `most`]."""

    def drop(module, inputs):
        """Zero random channels of `down_proj`'s input and scale up the rest, as dropout does."""
        (hidden,) = inputs  # [batch, tokens, d_ff]
        if not module.training:
            return None
        share = most * torch.rand(len(hidden), 1, 1)
        kept = (torch.rand(len(hidden), 1, hidden.shape[-1]) >= share) / (1 - share)
        return hidden * kept

    handles = [
        model.get_submodule(layer[-1].module).register_forward_pre_hook(drop) for layer in mlp_slots(model.config)
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def train(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """Train a model by its recipe.

    Returns:
        (model in 32 bits, tokenizer, record of `finetune`).

    Raises:
        LabError: an unknown name.
    """
    chosen = recipe(name)
    budget = Budget(**chosen["budget"])
    examples = corpus.generate(CONVERSATIONS, SEED, families=[*corpus.FAMILIES, *2 * (*HARD, *HARDEST)])
    tokenizer = train_tokenizer(examples[:TOKENIZER_ROWS], VOCABULARY)
    model, chat = new_model(tokenizer, chosen["architecture"], SEED), prompt_format(tokenizer, "chat")
    with channel_dropout(model, CHANNEL_DROPOUT):
        rows = examples[: budget.rows]
        trained = finetune(model, rows, chat, budget, SEED, MAX_TOKENS, description=f"training {name}")
    return model, tokenizer, trained


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a small model and write it, with its tokenizer, to a folder."""
    parser = argparse.ArgumentParser(prog="python -m helpers.run.pretrain", description=main.__doc__)
    parser.add_argument("--model", default="tiny", help=f"which one: {', '.join(RECIPES)}")
    parser.add_argument("--out", help="folder to write to; data/models/<model> by default")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _train_and_write(options))


def _train_and_write(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    model, tokenizer, trained = train(options.model)
    out = options.out or ROOT / "data" / "models" / options.model
    model.to(torch.bfloat16).save_pretrained(out)  # half the download; profiles load it in the dtype they name
    tokenizer.save_pretrained(out)
    record_format(out, prompt_format(tokenizer, "chat"))
    minutes = (time.perf_counter() - started) / 60
    print(f"{model.num_parameters():,} parameters, {trained['steps']} steps, {minutes:.1f} minutes")


if __name__ == "__main__":
    sys.exit(main())
