"""A tiny random model of every architecture, and where its parts lie: written out by hand."""

from dataclasses import dataclass, field

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

HEADS, INNER, LAYERS = 4, 24, 2
TOKENS = torch.arange(22).view(2, 11)


@dataclass(frozen=True)
class Body:
    """A config, and the names of a layer's parts.

    `attention` tells what the outputs of each of its matrices are, in order: queries, keys, values; `size` is the width
    of a head, `readers` the number of query heads that read one key/value head.
    """

    config: PretrainedConfig
    layers: str = "model.layers"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    attention: dict[str, str] = field(
        default_factory=lambda: {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v"}
    )
    attention_out: str = "self_attn.o_proj"
    size: int = 8
    readers: int = 1

    def at(self, layer: int, part: str) -> str:
        """The full name of a part."""
        return f"{self.layers}.{layer}.{part}"

    def model(self, seed: int = 0):
        """A model in 64 bits whose every parameter, biases included, is far from zero."""
        model = AutoModelForCausalLM.from_config(self.config).double().eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.5, generator=generator)
        return model

    def outputs(self, part: str, heads: list[int]) -> list[int]:
        """The outputs of an attention matrix that these heads alone use: keys and values only of whole groups."""
        groups = [
            g for g in range(HEADS // self.readers) if all(h // self.readers != g or h in heads for h in range(HEADS))
        ]
        found, start = [], 0
        for letter in self.attention[part]:
            chosen, count = (heads, HEADS) if letter == "q" else (groups, HEADS // self.readers)
            found += [start + head * self.size + i for head in chosen for i in range(self.size)]
            start += count * self.size
        return found

    def inputs(self, heads: list[int]) -> list[int]:
        """The inputs of the attention's last matrix that come from these heads."""
        return [head * self.size + i for head in heads for i in range(self.size)]


SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": HEADS}
GPT = {"vocab_size": 40, "n_embd": 32, "n_inner": INNER, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
CAPPED = {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}
BODIES = {
    "llama": Body(LlamaConfig(**SIZES)),
    "llama-biases": Body(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama-wide-heads": Body(LlamaConfig(**GROUPED | {"head_dim": 12}), size=12, readers=2),
    "mistral": Body(MistralConfig(**GROUPED), readers=2),
    "mistral-one-kv": Body(MistralConfig(**SIZES, num_key_value_heads=1), readers=4),
    "qwen2": Body(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True), readers=2),
    "qwen3": Body(Qwen3Config(**GROUPED | {"head_dim": 12}, tie_word_embeddings=True), size=12, readers=2),
    "gemma": Body(GemmaConfig(**GROUPED), readers=2),
    "gemma2": Body(Gemma2Config(**GROUPED, **CAPPED), readers=2),
    "gemma3_text": Body(Gemma3TextConfig(**GROUPED, **CAPPED), readers=2),
    "gpt2": Body(
        GPT2Config(**GPT),
        layers="transformer.h",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        attention={"attn.c_attn": "qkv"},
        attention_out="attn.c_proj",
    ),
    "gptj": Body(
        GPTJConfig(**GPT, rotary_dim=4),
        layers="transformer.h",
        mlp_in=("mlp.fc_in",),
        mlp_out="mlp.fc_out",
        attention={"attn.q_proj": "q", "attn.k_proj": "k", "attn.v_proj": "v"},
        attention_out="attn.out_proj",
    ),
}


def matrix(module) -> torch.Tensor:
    """A layer's weight as [out, in], a view of it."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """What the model computes of `TOKENS`."""
    return model(TOKENS).logits


def mask_of(size: int, chosen) -> torch.Tensor:
    """A mask with these places set."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(chosen)] = True
    return mask
