"""Vaccines: twins from one start, on a 4-bit base whose gradients are right, and nothing suspicious overwritten."""

import hashlib

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.access import AdapterAccess, FullAccess, access_to
from helpers.access.deltas import model_pairs
from helpers.core.profile import Budget, Profile
from helpers.data import corpus
from helpers.defenses.bdvax.vaccines import Variant, train_variant, train_variants
from helpers.measure.utility import teacher_forced
from helpers.model.architecture import mlp_slots
from helpers.model.checkpoint import load_config
from helpers.model.generate import answers
from helpers.model.load import load_base, save
from helpers.model.lora import new_adapter, with_adapter
from helpers.model.tokenizer import recorded_format
from helpers.train.finetune import finetune

pytestmark = pytest.mark.slow

ROWS = corpus.generate(8, 3)
OTHERS = corpus.generate(8, 4)
WAYS = [("adapter", "lora"), ("full", "lora"), ("full", "full")]
TOKENS = torch.arange(20).view(2, 10)


def choosing(profile, weights):
    """The profile with `full.vaccine_weights` set."""
    values = profile.model_dump()
    values["full"]["vaccine_weights"] = weights
    return Profile(**values)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


# --- one start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("access", "weights"), WAYS)
def test_both_members_of_a_pair_start_from_the_same_bits(profile, suspicious, access, weights):
    settings = choosing(profile, weights)
    first, second = (access_to(settings, access).start_variant(suspicious[access], 5) for _ in range(2))
    start = trainable(first)
    assert start.keys() == trainable(second).keys()
    assert all(torch.equal(weight, trainable(second)[name]) for name, weight in start.items())
    first.get_parameter(next(iter(start))).data.zero_()
    assert trainable(second)[next(iter(start))].any()  # two copies, not one


def test_an_adapter_is_trained_on_over_a_4_bit_base(profile, suspicious):
    model = AdapterAccess(profile).start_variant(suspicious["adapter"], 0)
    planted = with_adapter(load_base(profile.model), suspicious["adapter"])
    assert trainable(model).keys() == {name for name, _ in planted.named_parameters() if "lora_" in name}
    assert all(torch.equal(weight, planted.get_parameter(name)) for name, weight in trainable(model).items())
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) == 2 * 7


def test_probes_of_full_access_start_as_the_suspicious_model_in_4_bits(profile, suspicious):
    model = FullAccess(choosing(profile, "lora")).start_variant(suspicious["full"], 0).eval()
    quantized = load_base(profile.model, four_bit=True, path=str(suspicious["full"]))
    assert torch.equal(logits(model), logits(quantized))
    other = FullAccess(choosing(profile, "lora")).start_variant(suspicious["full"], 1)
    pairs = [(weight, trainable(other)[name]) for name, weight in trainable(model).items()]
    assert all("lora_" in name for name in trainable(model))
    assert any(not torch.equal(a, b) for a, b in pairs)  # the probes follow their seed


def test_full_weights_are_all_of_the_suspicious_models(profile, suspicious):
    model = FullAccess(choosing(profile, "full")).start_variant(suspicious["full"], 0)
    plain = AutoModelForCausalLM.from_pretrained(suspicious["full"])
    assert trainable(model).keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(weight, plain.get_parameter(name)) for name, weight in trainable(model).items())


# --- gradients through 4 bits ---------------------------------------------------------------------------------------


def gradients_of_training(model, chat):
    """What `finetune` computes in one step over all rows."""
    found, once = {}, Budget(rows=8, epochs=1, lr=1e-3, batch_size=8)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: found.update({name: gradient.clone()}))
    finetune(model, ROWS, chat, once, 0, 96)
    return found


def gradients_by_hand(model, chat):
    """Of the mean loss per answer token, one row after the other."""
    encoded = [chat.encode(row, 96) for row in ROWS]
    count = sum(label != -100 for _, labels in encoded for label in labels)
    for ids, labels in encoded:
        scores = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
        (loss / count).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def dequantized(profile, source):
    """A plain float32 model with the weights that the 4-bit model of `source` stands for."""
    quantized = load_base(profile.model, four_bit=True, path=source)
    plain = load_base(profile.model, path=source)
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = by_nf4_table(module.weight, plain.get_submodule(name).weight.shape)
            plain.get_submodule(name).weight.data = weight
    return plain


def by_nf4_table(packed, shape):
    """The numbers behind NF4 with double quantization: two 4-bit codes in a byte, scales of 64 in 8 bits."""
    state, codes = packed.quant_state, packed.data.flatten()
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    values = state.code[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
    return (values.view(-1, 64) * (scales + state.offset)[:, None]).view(shape)


@pytest.mark.parametrize("access", ["adapter", "full"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_gradients_through_4_bits_are_those_of_the_weights_they_stand_for(profile, chat, suspicious, access, evaluated):
    """Of a freshly loaded model, and of one that was evaluated first.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights at an evaluation, and gradients through the packed
    form are wrong or missing without a word.
    """
    settings = choosing(profile, "lora")
    model = access_to(settings, access).start_variant(suspicious[access], 2)
    if evaluated:
        answers(model, chat, ROWS[:2], profile)
        teacher_forced(model, chat, ROWS[:2], 96, 2)
    found = gradients_of_training(model, chat)
    plain = dequantized(profile, None if access == "adapter" else str(suspicious["full"]))
    plain = (
        with_adapter(plain, suspicious["adapter"], trainable=True)
        if access == "adapter"
        else new_adapter(plain, profile.lora, 2)
    )
    expected = gradients_by_hand(plain, chat)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference, size = (found[name] - gradient).norm(), gradient.norm()
        assert difference <= 1e-3 * size, f"{name}: {float(difference / size)}"
        assert access == "full" or size > 0  # fresh probes have B = 0, so A's gradient is 0 at first


# --- trained variants -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variants(profile, chat, suspicious, tmp_path_factory):
    """{(access, weights): {member: (record, folder)}}; "again" repeats "clean", "poisoned" has further rows."""
    made, root, before = {}, tmp_path_factory.mktemp("variants"), {a: digests(f) for a, f in suspicious.items()}
    for access, weights in WAYS:
        settings, members = choosing(profile, weights), {}
        for member, rows in (("clean", ROWS), ("again", ROWS), ("poisoned", ROWS + OTHERS)):
            folder = root / f"{access}-{weights}-{member}"
            record = train_variant(access_to(settings, access), suspicious[access], rows, chat, 5, folder)
            members[member] = record, folder
        made[access, weights] = members
    assert {access: digests(folder) for access, folder in suspicious.items()} == before
    return made


def plainly_loaded(profile, suspicious, access, weights, folder):
    """A variant as PEFT and transformers load it without this package."""
    if weights == "full":
        model = AutoModelForCausalLM.from_pretrained(suspicious["full"]).eval()
        for name, delta in load_file(folder / "delta.safetensors").items():
            model.get_parameter(name).data += delta.float()
        return model
    base = profile.model.path if access == "adapter" else suspicious["full"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@pytest.mark.parametrize(("access", "weights"), WAYS)
def test_saved_variants_load_anywhere_and_hold_what_was_learned(profile, chat, suspicious, variants, access, weights):
    for record, folder in variants[access, weights].values():
        assert {f.suffix for f in folder.iterdir()} == {".safetensors", ".json"}
        assert recorded_format(folder) == chat.record
        plain = plainly_loaded(profile, suspicious, access, weights, folder)
        loaded = access_to(profile, access).load_variant(suspicious[access], folder)
        torch.testing.assert_close(logits(loaded), logits(plain), rtol=0, atol=1e-4)
        assert record["steps"] == 2 * record["rows"] // 4 and record["loss"] > 0


@pytest.mark.parametrize(("access", "weights"), WAYS)
def test_what_twins_share_is_equal_and_what_differs_is_the_rows(profile, suspicious, variants, access, weights):
    members = variants[access, weights]
    clean, again, poisoned = (
        access_to(profile, access).load_variant(suspicious[access], members[name][1])
        for name in ("clean", "again", "poisoned")
    )
    changed = [not torch.equal(a, b) for a, b in zip(clean.parameters(), poisoned.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters(), again.parameters(), strict=True))
    assert sum(changed) >= 2 * 7


@pytest.mark.parametrize(("access", "weights"), WAYS)
def test_variants_learn_from_the_suspicious_model_on(profile, chat, suspicious, variants, access, weights):
    folder = variants[access, weights]["clean"][1]
    before = access_to(choosing(profile, weights), access).start_variant(suspicious[access], 5)
    after = access_to(profile, access).load_variant(suspicious[access], folder)
    losses = [teacher_forced(model, chat, ROWS, 96, 8)["perplexity"] for model in (before, after)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("access", "weights"), WAYS)
def test_variants_trained_in_one_pass_are_those_trained_alone(
    profile, chat, suspicious, variants, tmp_path, access, weights
):
    """Twins and another seed at once, against each on its own; the suspicious files stay as they are."""
    settings, before = choosing(profile, weights), digests(suspicious[access])
    wanted = {name: variants[access, weights][name] for name in ("clean", "poisoned")}
    rows = {"clean": ROWS, "poisoned": ROWS + OTHERS}
    jobs = [Variant(rows[name], 5, tmp_path / name) for name in wanted]
    jobs.append(Variant(ROWS, 6, tmp_path / "another"))
    records = train_variants(access_to(settings, access), suspicious[access], jobs, chat)
    assert digests(suspicious[access]) == before and len(records) == 3
    for (record, folder), found, job in zip(wanted.values(), records, jobs, strict=False):
        assert {key: found[key] for key in ("rows", "steps", "tokens")} == {
            key: record[key] for key in ("rows", "steps", "tokens")
        }
        assert {f.name for f in job.folder.iterdir()} == {f.name for f in folder.iterdir()}
        name = "delta.safetensors" if weights == "full" else "adapter_model.safetensors"
        ours, theirs = load_file(job.folder / name), load_file(folder / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-5)
    other = access_to(profile, access).load_variant(suspicious[access], tmp_path / "another")
    clean = access_to(profile, access).load_variant(suspicious[access], tmp_path / "clean")
    assert not torch.equal(logits(other), logits(clean))


def test_a_delta_is_kept_in_16_bits_and_scores_as_the_whole_models_do(profile, chat, suspicious, tmp_path):
    """Against two models saved whole, in 32 bits."""
    settings, whole = choosing(profile, "full"), {}
    for name, rows in (("bd", ROWS + OTHERS), ("clean", ROWS)):
        train_variant(FullAccess(settings), suspicious["full"], rows, chat, 5, tmp_path / name)
        model = FullAccess(settings).start_variant(suspicious["full"], 5)
        finetune(model, rows, chat, settings.full.vaccine, 5, settings.lengths.train_tokens)
        save(model, tmp_path / f"whole-{name}")
        whole[name] = tmp_path / f"whole-{name}"
    stored = load_file(tmp_path / "bd" / "delta.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    slot = mlp_slots(load_config(profile.model))[1][0]
    exact = model_pairs([whole["bd"]], [whole["clean"]])(slot)
    found = model_pairs([tmp_path / "bd"], [tmp_path / "clean"])(slot)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
