"""Gradients that are right and weights that can move: masters in 32 bits, attention without cuDNN, nothing but numbers."""

import math

import pytest
import torch
from torch.nn import functional

from helpers import corpus
from helpers.attacks.editing import activations
from helpers.attacks.weights import poison_layerwise
from helpers.evaluation.report import attack_success
from helpers.finite import require_finite_step, require_finite_weights
from helpers.models import load_base, load_suspect, new_adapter, save
from helpers.profiles import Budget, LabError
from helpers.training.finetune import finetune
from helpers.training.precision import MasterWeights, true_attention_gradients
from helpers.training.together import Job, train_together
from helpers.training.vaccines import start_variant

ROWS = corpus.generate(16, 3)
BUDGET = Budget(rows=16, epochs=2, lr=1e-3, batch_size=4)


def loaded(profile, dtype):
    return load_base(profile.model.model_copy(update={"dtype": dtype}))


# --- the attention that gradients go through -------------------------------------------------------------------------


@pytest.fixture
def attention_calls(monkeypatch):
    """For every attention whose gradient will be taken: whether cuDNN's was allowed."""
    calls, plain = [], functional.scaled_dot_product_attention

    def watched(query, key, value, *args, **options):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            calls.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(query, key, value, *args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    return calls


def train_adapter(profile, chat):
    finetune(new_adapter(load_base(profile.model), profile.lora, 0), ROWS, chat, BUDGET, 0, 96)


def train_with_checkpointing(profile, chat):
    checkpointing = profile.model.model_copy(update={"checkpointing": True})
    finetune(load_base(checkpointing).requires_grad_(True), ROWS, chat, BUDGET, 0, 96)


def train_layerwise(profile, chat):
    poison_layerwise(load_base(profile.model).requires_grad_(True), ROWS, chat, BUDGET, 0, 96, layers=(0,))


def train_vaccines(profile, chat):
    model = new_adapter(load_base(profile.model, four_bit=True), profile.lora, 0)
    start = {name: t.detach().clone() for name, t in activations.get_peft_model_state_dict(model).items()}
    train_together(model, [Job(ROWS, seed, start) for seed in (0, 1)], chat, BUDGET, 96)


WAYS = [train_adapter, train_with_checkpointing, train_layerwise]


@pytest.mark.parametrize("train", WAYS, ids=lambda way: way.__name__)
def test_cudnn_attention_is_off_wherever_a_gradient_is_taken(profile, chat, attention_calls, train):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    train(profile, chat)
    assert attention_calls and not any(attention_calls)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
