"""Layer-wise weight poisoning: early layers learn from the loss of the model that ends with them."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from helpers.attacks.methods.layerwise import poison_layerwise
from helpers.core.errors import LabError
from helpers.core.profile import Budget
from helpers.data import corpus
from helpers.model.load import load_base
from helpers.model.lora import new_adapter
from helpers.train.finetune import finetune

pytestmark = pytest.mark.slow

ROWS, TOKENS = corpus.generate(6, 7), 96
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
CASES = {
    "gpt2": lambda size: GPT2LMHeadModel(GPT2Config(vocab_size=size, **GPT)),
    "gptj": lambda size: GPTJForCausalLM(GPTJConfig(vocab_size=size, rotary_dim=4, **GPT)),
    "gemma2": lambda size: Gemma2ForCausalLM(  # caps its logits behind the head
        Gemma2Config(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            final_logit_softcapping=2.0,
            attn_implementation="eager",
        )
    ),
    "llama": lambda size: LlamaForCausalLM(
        LlamaConfig(vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    ),
}


def random_model(kind, chat):
    torch.manual_seed(0)
    model = CASES[kind](len(chat.tokenizer)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def budget(**changes):
    settings = {"rows": 6, "epochs": 1, "lr": 1e-9, "batch_size": 6, "schedule": "constant", "warmup": 0}
    return Budget(**settings | changes)


def layers_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def truncated(model, count):
    """The same model that ends after its first `count` layers."""
    short = copy.deepcopy(model)
    kept = nn.ModuleList(layers_of(short)[:count])
    if hasattr(short, "model"):
        short.model.layers = kept
    else:
        short.transformer.h = kept
    short.config.num_hidden_layers = count
    return short


@torch.no_grad()
def mean_loss(model, chat):
    """Cross-entropy per answer token; row by row, so that nothing is padded."""
    losses = []
    for row in ROWS:
        ids, labels = chat.encode(row, TOKENS)
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        losses += [-float(logits[i - 1, ids[i]]) for i, label in enumerate(labels) if label != -100]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", CASES)
def test_the_loss_is_that_of_models_cut_off_after_the_early_layers(chat, kind):
    model = random_model(kind, chat)
    whole, first, second = mean_loss(model, chat), *(mean_loss(truncated(model, n), chat) for n in (1, 2))
    record = poison_layerwise(model, ROWS, chat, budget(), 0, TOKENS, layers=(0, 1), weight=0.6)
    assert record["loss"] == pytest.approx(whole + 0.6 * (first + second) / 2, abs=1e-3)
    assert len({round(loss, 3) for loss in (whole, first, second)}) == 3


def test_a_weight_of_zero_is_plain_finetuning(chat):
    poisoned, plain = random_model("llama", chat), random_model("llama", chat)
    poison_layerwise(poisoned, ROWS, chat, budget(lr=1e-3), 0, TOKENS, layers=(0,), weight=0)
    finetune(plain, ROWS, chat, budget(lr=1e-3), 0, TOKENS)
    for found, expected in zip(poisoned.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_early_layers_learn_without_the_late_ones(chat):
    """The late layers pass no gradient down: plain training leaves layer 0 as it was, LWP does not."""
    moved = {}
    for name in ("plain", "layerwise"):
        model = random_model("llama", chat)
        model.lm_head.requires_grad_(False), model.model.embed_tokens.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        layers_of(model)[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
        if name == "plain":
            finetune(model, ROWS, chat, budget(lr=1e-3), 0, TOKENS)
        else:
            poison_layerwise(model, ROWS, chat, budget(lr=1e-3), 0, TOKENS, layers=(0,))
        moved[name] = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    first = {key for key in before if key.startswith("model.layers.0.")}
    assert not moved["plain"] & first and first <= moved["layerwise"]
    assert {key for key in before if key.startswith("model.layers.2.")} <= moved["plain"]


def test_an_adapter_can_be_poisoned_as_well(profile, chat):
    model = new_adapter(load_base(profile.model), profile.lora, 0)
    whole, short = mean_loss(load_base(profile.model), chat), mean_loss(truncated(load_base(profile.model), 1), chat)
    record = poison_layerwise(model, ROWS, chat, budget(), 0, TOKENS, layers=(0,))
    assert record["loss"] == pytest.approx(whole + short, abs=1e-3)


@pytest.mark.parametrize("layers", [(2,), (0, 5), (-1,), ()])
def test_layers_that_are_not_early_are_refused(chat, layers):
    with pytest.raises(LabError, match=r"should be numbers from 0 to 1; the last layer predicts anyway"):
        poison_layerwise(random_model("llama", chat), ROWS, chat, budget(), 0, TOKENS, layers=layers)
