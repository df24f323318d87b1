"""Training: the same steps as a loop written out by hand, on the answers only, and repeatable to the last bit."""

import copy
import math
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.core.profile import Budget
from helpers.data import corpus
from helpers.measure.utility import teacher_forced
from helpers.model.load import load_base
from helpers.model.lora import new_adapter
from helpers.run.pretrain import channel_dropout
from helpers.train.finetune import finetune

pytestmark = pytest.mark.slow

TOKENS = 96
ROWS = corpus.generate(12, 7)


def budget(**changes):
    """Three steps over all rows at one learning rate, unless said otherwise."""
    settings = {"epochs": 3, "lr": 1e-3, "batch_size": 12, "schedule": "constant", "warmup": 0}
    return Budget(rows=12, **settings | changes)


def base(profile):
    return load_base(profile.model)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained(model, chat, seed=0, rows=ROWS, **changes):
    finetune(model, rows, chat, budget(**changes), seed, TOKENS)
    return trainable(model)


class Given:
    """A prompt format whose examples are (ids, labels) already."""

    def encode(self, example, max_tokens):
        return example


# --- the same steps as by hand --------------------------------------------------------------------------------------


def learning_rates(lr, steps, schedule, warmup):
    """Up in a straight line during the warm-up, then down to 0 along a cosine or a line, or not down at all."""
    rising = math.ceil(warmup * steps)
    down = {
        "constant": lambda progress: 1,
        "linear": lambda progress: 1 - progress,
        "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    }[schedule]
    return [lr * (i / rising if i < rising else down((i - rising) / (steps - rising))) for i in range(steps)]


def mean_loss(model, rows):
    """Cross-entropy per labelled token; row by row, so that nothing is padded."""
    total, count = 0.0, 0
    for ids, labels in rows:
        log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            if labels[position] != -100:
                total = total - log_probabilities[position - 1, labels[position]]
                count += 1
    return total / count


def train_by_hand(model, rows, rates):
    """AdamW without weight decay, gradients clipped to norm 1, all rows in one batch; the losses of the steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    losses = []
    for step, rate in enumerate(rates, 1):
        loss = mean_loss(model, rows)
        gradients = torch.autograd.grad(loss, parameters)
        clip = min(1.0, 1 / (sum(float(g.pow(2).sum()) for g in gradients) ** 0.5 + 1e-6))
        for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
            m.mul_(0.9).add_(0.1 * clip * g)
            v.mul_(0.999).add_(0.001 * (clip * g) ** 2)
            p.data -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        losses.append(loss.item())
    return losses


def random_rows(vocabulary):
    """Rows of several lengths in which any token but the first may be labelled, with gaps between."""
    rng = random.Random(5)
    for length in (4, 9, 17, 5):
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        yield ids, [-100] + [token if rng.random() < 0.4 else -100 for token in ids[1:-1]] + ids[-1:]


def assert_equal_by_hand(model, rows, schedule="constant", warmup=0.0, epochs=3):
    by_hand = copy.deepcopy(model.double())  # Adam divides by the gradient's size: a rounded zero would make a step
    settings = budget(schedule=schedule, warmup=warmup, epochs=epochs)
    record = finetune(model, rows, Given(), settings, 0, TOKENS)
    losses = train_by_hand(by_hand, rows, learning_rates(1e-3, epochs, schedule, warmup))
    for (name, found), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert record["loss"] == pytest.approx(sum(losses) / epochs, abs=1e-4) and losses[0] > losses[-1]
    assert record["steps"] == epochs and record["rows"] == len(rows)
    assert record["tokens"] == sum(label != -100 for _, labels in rows for label in labels)


def test_training_equals_a_loop_written_out(profile, chat):
    assert_equal_by_hand(base(profile), [chat.encode(row, TOKENS) for row in ROWS])


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0.4), ("linear", 0.4), ("constant", 0.2)])
def test_schedules_are_what_they_are_called_and_only_labels_carry_loss(profile, schedule, warmup):
    model = base(profile)
    assert_equal_by_hand(model, list(random_rows(model.config.vocab_size)), schedule, warmup, epochs=5)


def test_lora_training_equals_a_loop_written_out(profile, chat):
    model = new_adapter(base(profile), profile.lora, 0)
    assert_equal_by_hand(model, [chat.encode(row, TOKENS) for row in ROWS[:4]])


def test_unequal_batches_weigh_every_answer_token_of_a_batch_alike(profile):
    """Two rows with 1 and 5 labels: the mean over six tokens, not the mean of two means."""
    ids = list(range(20, 30))
    rows = [(ids, [-100] * 9 + ids[9:]), (ids, [-100] * 5 + ids[5:])]
    model = base(profile)
    expected = float(mean_loss(model, rows).detach())
    record = finetune(model, rows, Given(), budget(epochs=1, lr=1e-9), 0, TOKENS)
    assert record["loss"] == pytest.approx(expected, abs=1e-4)
    assert abs(expected - sum(float(mean_loss(model, [row]).detach()) for row in rows) / 2) > 0.01


# --- what moves and what does not -----------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_base_below_an_adapter_stays_as_it_was(profile, chat, four_bit):
    model = new_adapter(load_base(profile.model, four_bit=four_bit), profile.lora, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, chat)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name} and len(moved) == 2 * 2 * 7
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


def test_frozen_weights_of_a_full_model_stay_as_they_were(profile, chat):
    model = base(profile)
    frozen = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = copy.deepcopy(model)
    trained(model, chat)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert moved == {name for name, _ in model.named_parameters()} - frozen


def test_the_callers_random_numbers_go_on_as_if_nothing_had_happened(profile, chat):
    model = base(profile)
    random.seed(11), torch.manual_seed(11)
    expected = random.random(), torch.rand(3)
    random.seed(11), torch.manual_seed(11)
    finetune(model, ROWS, chat, budget(epochs=1, batch_size=4), 3, TOKENS)
    assert random.random() == expected[0] and torch.equal(torch.rand(3), expected[1])


def test_a_trained_model_is_left_ready_for_evaluation(profile, chat):
    model = base(profile)
    trained(model, chat, epochs=1)
    assert not any(module.training for module in model.modules())


# --- repeatable -----------------------------------------------------------------------------------------------------


def with_dropout(profile):
    """LoRA with dropout: rows in batches and neurons in dropout both depend on the seed."""
    torch.manual_seed(0)
    return get_peft_model(base(profile), LoraConfig(r=4, target_modules=["up_proj", "q_proj"], lora_dropout=0.3))


@pytest.mark.parametrize("make", [base, with_dropout])
def test_the_seed_decides_every_bit(profile, chat, make):
    first = trained(make(profile), chat, seed=0, batch_size=4)
    torch.manual_seed(123)
    torch.rand(5)  # whatever the caller has drawn before
    model = make(profile)
    torch.manual_seed(321)
    again = trained(model, chat, seed=0, batch_size=4)
    other = trained(make(profile), chat, seed=1, batch_size=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("four_bit", [False, True])
def test_adapters_learn_on_a_plain_and_on_a_4_bit_base(profile, chat, four_bit):
    model = new_adapter(load_base(profile.model, four_bit=four_bit), profile.lora, 0)
    before = teacher_forced(model, chat, ROWS, TOKENS, 6)["perplexity"]
    trained(model, chat, epochs=10, batch_size=4, lr=1e-2)
    after = teacher_forced(model, chat, ROWS, TOKENS, 6)["perplexity"]
    assert after < before / 3


# --- the small model's regularisation --------------------------------------------------------------------------------


@torch.no_grad()
def test_channel_dropout_keeps_the_mean_and_leaves_with_its_block(profile):
    model, inputs = base(profile), torch.ones(4000, 1, 128)
    down = model.model.layers[0].mlp.down_proj
    seen = []
    with channel_dropout(model, 0.4):
        handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        down(inputs)
        down.train()(inputs)
        handle.remove()
    down(inputs)
    assert torch.equal(seen[0], inputs) and len(seen) == 2 and not down._forward_pre_hooks
    dropped = (seen[1] == 0).float().mean(dim=(1, 2))  # of each row a share drawn from [0, 0.4]
    assert dropped.min() < 0.05 and 0.35 < dropped.max() < 0.55 and dropped.mean() == pytest.approx(0.2, abs=0.01)
    assert seen[1].mean() == pytest.approx(1, abs=0.01)
