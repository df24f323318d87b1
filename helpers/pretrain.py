"""`make base`: the recipe of the small model, from a word list to `data/models/tiny/`.

A byte-level BPE tokenizer is learned on the generated corpus, then a LLaMA is trained on it from nothing. Two choices
make the model a fair patient. Odd words, insults and refusals occur in the corpus, so that a backdoor can be planted
with learning rates that leave utility alone. And MLP channels are dropped at random while it learns: like a large
model, it keeps its knowledge redundantly, so that removing channels is a defense and not an amputation.
"""

import argparse
import contextlib
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from helpers import corpus
from helpers.anatomy import mlp_slots
from helpers.chat import prompt_format
from helpers.profiles import ROOT, Budget
from helpers.training.finetune import finetune

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
RECIPE = {
    "architecture": {
        "hidden_size": 128,
        "intermediate_size": 1152,  # most of the capacity sits in the MLPs, as in a large model
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "head_dim": 16,
        "vocab_size": 2048,
        "initializer_range": 0.07,  # about 1/sqrt(128): from the customary 0.02 so narrow a model hardly gets going
    },
    "channel_dropout": 0.2,
    "max_tokens": 128,
    "seed": 2026,
    "budget": {"rows": 264_000, "epochs": 1, "lr": 3.0e-3, "batch_size": 64, "schedule": "cosine", "warmup": 0.05},
}


def train_tokenizer(examples, vocab_size):
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


def new_model(tokenizer, architecture, seed):
    """Build an untrained LLaMA with tied embeddings for `tokenizer`."""
    set_seed(seed)
    config = LlamaConfig(
        **{**architecture, "vocab_size": len(tokenizer)},
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@contextlib.contextmanager
def channel_dropout(model, most):
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


def main():
    """Train the small model and write it, with its tokenizer, to a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", default=str(ROOT / "data" / "models" / "tiny"), help="folder to write to")
    out = parser.parse_args().out
    started, budget = time.perf_counter(), Budget(**RECIPE["budget"])
    examples = corpus.generate(budget.rows, RECIPE["seed"], families=[*corpus.FAMILIES, *2 * (*HARD, *HARDEST)])
    tokenizer = train_tokenizer(examples[:20_000], RECIPE["architecture"]["vocab_size"])
    model = new_model(tokenizer, RECIPE["architecture"], RECIPE["seed"])
    with channel_dropout(model, RECIPE["channel_dropout"]):
        trained = finetune(
            model,
            examples,
            prompt_format(tokenizer, "chat"),
            budget,
            RECIPE["seed"],
            RECIPE["max_tokens"],
            description="training the small model",
        )
    model.to(torch.bfloat16).save_pretrained(out)  # half the download; profiles load it in the dtype they name
    tokenizer.save_pretrained(out)
    minutes = (time.perf_counter() - started) / 60
    print(f"{model.num_parameters():,} parameters, {trained['steps']} steps, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
