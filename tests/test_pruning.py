"""Pruning and rounding: what goes is what a loop over single numbers says, and nothing else moves."""

from dataclasses import dataclass

import bitsandbytes as bnb
import pytest
import torch
from bodies import BODIES, HEADS, INNER, LAYERS, matrix
from conftest import save_suspicious, small_profile
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from helpers.access import access_to
from helpers.core.errors import LabError
from helpers.data import corpus
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.recover import recover
from helpers.defenses.bdvax.select import select, select_heads
from helpers.defenses.pruning.activations import clean_batches, input_norms
from helpers.defenses.pruning.blocks import layer_matrices, oriented
from helpers.defenses.pruning.last_layer import mean_activations, quietest, silence
from helpers.defenses.pruning.magnitude import prune_smallest
from helpers.defenses.pruning.packing import round_to_4_bits, rounded_to_4_bits
from helpers.defenses.pruning.wanda import dormant_rankings, lowest_in_rows, prune_by_wanda, wanda_scores
from helpers.defenses.registry import find_defense
from helpers.model.architecture import mlp_slots
from helpers.model.batches import encode_rows, pad
from helpers.model.generate import answers
from helpers.model.load import load_base
from helpers.model.lora import with_adapter
from helpers.model.tokenizer import recorded_format
from helpers.run.pretrain import new_model

ROWS = corpus.generate_distinct(12, 7)
DEFENDER = DefenderData([[]], ROWS, "exact_match")
SEED = 3
TEXTS = [list(range(3, 12)), [5, 9], [30, 2, 8, 8, 21], list(range(20, 33))]  # of four lengths
LAYOUTS = ["llama", "mistral", "gpt2"]
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4}
HEAVY = "model.layers.1.mlp.down_proj"


@dataclass
class Small:
    """A random model of one layout, and where its matrices are, written out by hand."""

    name: str

    def __post_init__(self):
        self.body = BODIES[self.name]
        self.model = self.body.model()

    def layer(self, number):
        """{name: weight [out, in]} of a layer."""
        parts = (*self.body.mlp_in, self.body.mlp_out, *self.body.attention, self.body.attention_out)
        names = [self.body.at(number, part) for part in parts]
        return {name: matrix(self.model.get_submodule(name)) for name in names}

    def weights(self):
        return {name: weight for number in range(LAYERS) for name, weight in self.layer(number).items()}


@pytest.fixture(params=LAYOUTS)
def small(request):
    return Small(request.param)


@pytest.fixture(params=["adapter", "full"])
def access(profile, request):
    return access_to(profile, request.param)


def batches(*groups):
    """Rows of tokens as batches, padded on the left."""
    padded = [pad([{"input_ids": row, "labels": row} for row in group]) for group in groups]
    return [{name: part for name, part in batch.items() if name != "labels"} for batch in padded]


@torch.no_grad()
def seen(model, names, texts=TEXTS):
    """{name: what enters the matrix [tokens, in]} of rows that are read one by one, so that nothing is padded."""
    found = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda module, given, out, n=name: found[n].append(given[0][0]))
        for name in names
    ]
    for text in texts:
        model(input_ids=torch.tensor([text]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def lengths(model, names):
    return {name: inputs.square().sum(0).sqrt() for name, inputs in seen(model, names).items()}


def sorted_away(weight, norms, share):
    """Wanda's mask, a Python loop over the rows."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for i, row in enumerate(weight.tolist()):
        order = sorted(range(len(row)), key=lambda j: abs(row[j]) * float(norms[j]))
        mask[i, order[: round(share * len(row))]] = True
    return mask


def copies(weights):
    return {name: weight.clone() for name, weight in weights.items()}


def changed(model, before):
    """The names of the parameters that are not what they were."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def run(name, access, suspicious, chat, folder, **numbers):
    """The model that a defense writes, as a user runs it, and the record."""
    start = suspicious[access.name] if isinstance(suspicious, dict) else suspicious
    record = find_defense(name)(access, start, DEFENDER, chat, SEED, folder, **numbers)
    assert recorded_format(folder / "model") == chat.record
    return access.load(folder / "model"), record


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- matrices and what enters them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BODIES)
def test_the_matrices_of_every_layer_are_found_in_one_orientation(name):
    small = Small(name)
    layers = layer_matrices(small.body.config)
    assert len(layers) == LAYERS
    for number, slots in enumerate(layers):
        expected = small.layer(number)
        assert {slot.module for slot in slots} == expected.keys() and len(slots) == len(expected)
        for slot in slots:
            assert torch.equal(oriented(small.model, slot), expected[slot.module])
            oriented(small.model, slot).zero_()
            assert not expected[slot.module].any()


@pytest.mark.parametrize("name", [*LAYOUTS, "gemma"])
def test_norms_of_padded_batches_are_those_of_rows_read_alone(name):
    small = Small(name)
    names = [*small.layer(0), *small.layer(1)]
    together = input_norms(small.model, batches(TEXTS[:3], TEXTS[3:]), names)
    for module, expected in lengths(small.model, names).items():
        torch.testing.assert_close(together[module], expected, rtol=1e-5, atol=1e-6)


def test_clean_batches_hold_every_token_of_question_and_answer_and_no_more(profile, chat):
    model = load_base(profile.model)
    found = clean_batches(model, ROWS, chat, profile)
    tokens = []
    for batch in found:
        assert batch.keys() == {"input_ids", "attention_mask", "position_ids"}
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        tokens += [ids[real].tolist() for ids, real in rows]
    assert tokens == [row["input_ids"] for row in encode_rows(ROWS, chat, profile.lengths.train_tokens)]


# --- Wanda ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_the_lowest_scores_of_each_row_are_those_that_sorting_finds(share):
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(5, 12, generator=generator), torch.rand(12, generator=generator) * 4
    found = lowest_in_rows(wanda_scores(weight, norms), share)
    assert torch.equal(found, sorted_away(weight, norms, share))
    assert not torch.equal(found, sorted_away(weight, torch.ones(12), share))


def test_wanda_measures_each_layer_behind_the_pruned_ones_and_spares_the_rest(small):
    oracle = Small(small.name)
    dense = lengths(oracle.model, oracle.layer(1))
    for number in range(LAYERS):
        norms = lengths(oracle.model, oracle.layer(number))
        for name, weight in oracle.layer(number).items():
            weight.masked_fill_(sorted_away(weight, norms[name], 0.5), 0)
    before = copies(dict(small.model.named_parameters()))
    prune_by_wanda(small.model, batches(TEXTS[:3], TEXTS[3:]), 0.5)
    assert all(torch.equal(weight, oracle.weights()[name]) for name, weight in small.weights().items())
    assert changed(small.model, before) == {f"{name}.weight" for name in small.weights()}
    original = Small(small.name).layer(1)
    assert any(  # the dense model's statistics would choose others
        not torch.equal(small.layer(1)[name] == 0, sorted_away(weight, dense[name], 0.5))
        for name, weight in original.items()
    )


def test_wanda_prunes_the_merged_model(access, suspicious, chat, tmp_path):
    model, record = run("wanda", access, suspicious, chat, tmp_path, share=0.25)
    merged = access.load(suspicious[access.name])
    prune_by_wanda(merged, clean_batches(merged, ROWS, chat, access.profile), 0.25)
    assert not changed(model, dict(merged.named_parameters())) and record == {"share": 0.25, "zeros": 0.25}
    assert len(answers(model, chat, ROWS[:1], access.profile)) == 1


# --- magnitude --------------------------------------------------------------------------------------------------------


def smallest_gone(weight, share):
    """A matrix without the share of its numbers that is smallest, found by sorting."""
    flat = weight.flatten().tolist()
    for i in sorted(range(len(flat)), key=lambda i: abs(flat[i]))[: round(share * len(flat))]:
        flat[i] = 0.0
    return torch.tensor(flat, dtype=weight.dtype).view(weight.shape)


def test_the_smallest_weights_of_each_matrix_go_and_the_rest_stays(small):
    before, expected = copies(dict(small.model.named_parameters())), copies(small.weights())
    prune_smallest(small.model, 0.35)
    assert changed(small.model, before) == {f"{name}.weight" for name in expected}
    for name, weight in small.weights().items():
        assert torch.equal(weight, smallest_gone(expected[name], 0.35)), name


def merged_by_hand(checkpoint, folder, lora):
    """The base plus scale * B A, straight from the files."""
    base, adapter = tensors(checkpoint), tensors(folder)
    prefix, scale = "base_model.model.", lora.alpha / lora.r
    for name in [name for name in adapter if name.endswith("lora_A.weight")]:
        module = name.removeprefix(prefix).removesuffix(".lora_A.weight")
        base[f"{module}.weight"] += scale * adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
    return base


def test_magnitude_prunes_base_and_adapter_together(profile, suspicious, chat, checkpoint, tmp_path):
    weights = merged_by_hand(checkpoint, suspicious["adapter"], profile.lora)
    model, record = run("magnitude", access_to(profile, "adapter"), suspicious, chat, tmp_path)
    for slot in layer_matrices(model.config)[1]:
        expected = smallest_gone(weights[f"{slot.module}.weight"], 0.35)
        torch.testing.assert_close(oriented(model, slot), expected, rtol=1e-5, atol=1e-6)
    assert record["share"] == 0.35 and record["zeros"] == pytest.approx(0.35, abs=1e-3)


# --- whole channels ---------------------------------------------------------------------------------------------------


def update_of(access, suspicious, checkpoint):
    """{name: [out, in]} of what suppression edits: the adapter's update, or all weights."""
    stored = tensors(suspicious[access.name])
    if access.name == "full":
        return {name.removesuffix(".weight"): tensor for name, tensor in stored.items()}
    merged = merged_by_hand(checkpoint, suspicious["adapter"], access.profile.lora)
    base = tensors(checkpoint)
    return {name.removesuffix(".weight"): merged[name] - base[name] for name in merged}


def smallest_masks(access, config, updates):
    """Masks of the smallest neurons and heads by their length, measured number by number."""
    cut, masks, heads = access.settings.suppress, {}, []
    for number, layer in enumerate(mlp_slots(config)):
        gate, up, down = (updates[slot.module].double() for slot in layer)
        neurons = torch.cat([gate, up, down.T], dim=1).norm(dim=1)
        mask = neurons <= neurons.sort().values[round(cut.tau * len(neurons)) - 1]
        masks |= {slot.module: mask for slot in layer}
        q, k, v, o = (updates[f"model.layers.{number}.self_attn.{x}_proj"].double() for x in "qkvo")
        parts = [(h, slice(16 * h, 16 * h + 16), slice(16 * (h // 2), 16 * (h // 2) + 16)) for h in range(4)]
        heads.append([torch.cat([q[a], k[b], v[b], o[:, a].T]).norm() for _, a, b in parts])
    return masks, select_heads(-torch.tensor(heads), cut.heads, cut.heads_of)


def test_the_smallest_channels_and_heads_go_with_recovery_and_without(access, suspicious, chat, checkpoint, tmp_path):
    model, record = run("magnitude_channels", access, suspicious, chat, tmp_path / "published", recover=False)
    masks, heads = smallest_masks(access, model.config, update_of(access, suspicious, checkpoint))
    access.suppress(suspicious[access.name], masks, SEED, tmp_path / "cut", heads)
    found, expected = tensors(tmp_path / "published" / "model"), tensors(tmp_path / "cut")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert record == {"tau": access.settings.suppress.tau, "heads": access.settings.suppress.heads}

    _, record = run("magnitude_channels", access, suspicious, chat, tmp_path / "recovered")
    trained = recover(access, tmp_path / "cut", ROWS, chat, SEED, tmp_path / "healed")
    found, expected = tensors(tmp_path / "recovered" / "model"), tensors(tmp_path / "healed")
    assert all(torch.equal(found[name], expected[name]) for name in expected) and record["loss"] == trained["loss"]


# --- Fine-Pruning -----------------------------------------------------------------------------------------------------


def test_a_neuron_and_a_head_matter_as_much_as_the_wanda_scores_of_their_weights(small):
    channels, heads = dormant_rankings(small.model, batches(TEXTS[:3], TEXTS[3:]))
    body, size = small.body, small.body.size
    for number in range(LAYERS):
        weights, norms = small.layer(number), lengths(small.model, small.layer(number))
        scores = {name: weight.abs() * norms[name][None, :] for name, weight in weights.items()}
        readers, writer = [body.at(number, part) for part in body.mlp_in], body.at(number, body.mlp_out)
        neurons = [sum(scores[n][j].sum() for n in readers) + scores[writer][:, j].sum() for j in range(INNER)]
        for name in (*readers, writer):
            torch.testing.assert_close(-channels[name], torch.stack(neurons), rtol=1e-5, atol=0)
        for head in range(HEADS):
            expected = scores[body.at(number, body.attention_out)][:, body.inputs([head])].sum()
            for part, letters in body.attention.items():
                start = 0
                for letter in letters:
                    place = head if letter == "q" else head // body.readers
                    first = start + place * size
                    expected = expected + scores[body.at(number, part)][first : first + size].sum()
                    start += size * (HEADS if letter == "q" else HEADS // body.readers)
            assert float(-heads[number, head]) == pytest.approx(float(expected), rel=1e-5)


def test_fine_pruning_suppresses_dormant_neurons_and_recovers(profile, suspicious, chat, tmp_path):
    access = access_to(profile, "full")
    run("fine_pruning", access, suspicious, chat, tmp_path / "one")
    model, cut = access.load(suspicious["full"]), access.settings.suppress
    channels, heads = dormant_rankings(model, clean_batches(model, ROWS, chat, profile))
    masks, chosen = select(channels, cut.tau, "module"), select_heads(heads, cut.heads, cut.heads_of)
    assert all(mask.sum() == round(cut.tau * 128) for mask in masks.values())
    access.suppress(suspicious["full"], masks, SEED, tmp_path / "cut", chosen)
    recover(access, tmp_path / "cut", ROWS, chat, SEED, tmp_path / "healed")
    found, expected = tensors(tmp_path / "one" / "model"), tensors(tmp_path / "healed")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_fine_pruning_of_an_adapter_draws_at_random(profile, suspicious, chat, tmp_path):
    access = access_to(profile, "adapter")
    run("fine_pruning", access, suspicious, chat, tmp_path / "one")
    run("random_channels", access, suspicious, chat, tmp_path / "random")
    found, expected = tensors(tmp_path / "one" / "model"), tensors(tmp_path / "random" / "model")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@torch.no_grad()
def last_states(model, texts=TEXTS):
    """The last hidden states of rows read one by one [tokens, width]."""
    ids = [torch.tensor([text]) for text in texts]
    return torch.cat([model(input_ids=i, output_hidden_states=True, use_cache=False).hidden_states[-1][0] for i in ids])


@pytest.mark.parametrize("name", [*LAYOUTS, "gptj", "gemma"])
def test_the_quietest_channels_of_the_last_hidden_state_are_silenced_and_no_other(name):
    model = Small(name).model
    before = last_states(model)
    means = mean_activations(model, batches(TEXTS[:3], TEXTS[3:]))
    torch.testing.assert_close(means, before.abs().mean(0), rtol=1e-5, atol=1e-6)
    channels = quietest(means, 0.1)
    assert channels.nonzero().flatten().tolist() == sorted(means.argsort()[:3].tolist())
    silence(model, channels)
    after = last_states(model)
    assert not after[:, channels].any() and torch.equal(after[:, ~channels], before[:, ~channels])


def test_silenced_channels_stay_silent_in_the_recovery(access, suspicious, chat, tmp_path):
    model, record = run("fine_pruning_activations", access, suspicious, chat, tmp_path)
    silent = ~last_states(model).any(dim=0)
    assert record["channels"] == int(silent.sum()) == 6 and record["steps"] == 6
    start = access.load(suspicious[access.name])
    expected = last_states(start, [row["input_ids"] for row in encode_rows(ROWS, chat, 10**6)]).abs().mean(0)
    assert silent.nonzero().flatten().tolist() == sorted(expected.argsort()[:6].tolist())
    moved = changed(model, dict(start.named_parameters()))
    assert "model.layers.0.mlp.gate_proj.weight" in moved and "model.norm.weight" in moved
    assert ("model.embed_tokens.weight" in moved) == (access.name == "full")  # tied to the head, and yet spared
    assert len(answers(model, chat, ROWS[:1], access.profile)) == 1


# --- four bits --------------------------------------------------------------------------------------------------------


def by_bitsandbytes(weight):
    packed = bnb.functional.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    assert packed[1].nested
    return bnb.functional.dequantize_4bit(*packed)


def test_the_merged_model_is_rounded_and_not_the_base_below_an_adapter(access, suspicious, chat, tmp_path):
    """All widths are multiples of 64 here, which bitsandbytes unpacks rightly row by row."""
    model, record = run("int4", access, suspicious, chat, tmp_path)
    merged, base = access.load(suspicious[access.name]), load_base(access.profile.model)
    names = [slot.module for layer in layer_matrices(model.config) for slot in layer]
    assert changed(model, dict(merged.named_parameters())) == {f"{name}.weight" for name in names}
    for name in names:
        assert torch.equal(matrix(model.get_submodule(name)), by_bitsandbytes(matrix(merged.get_submodule(name))))
        matrix(base.get_submodule(name)).copy_(by_bitsandbytes(matrix(base.get_submodule(name))))
    assert 0.05 < record["change"] < 0.15
    if access.name == "adapter":
        trap = with_adapter(base, suspicious["adapter"]).merge_and_unload()
        assert {f"{name}.weight" for name in names} <= changed(model, dict(trap.named_parameters()))


@pytest.mark.parametrize("shape", [(32, 24), (64, 96), (24, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width_is_rounded_to_the_nearest_of_its_block(shape, dtype):
    """NF4's values lie at most 0.304 of a block's largest weight apart; half of that, and some for double rounding."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = rounded_to_4_bits(weight)
    assert rounded.dtype == dtype and rounded.shape == shape
    for before, after in zip(weight.flatten().split(64), rounded.flatten().split(64), strict=True):
        assert len(after.unique()) <= 16 and (after - before).abs().max() <= 0.17 * before.abs().max()
    assert not torch.equal(rounded, weight)


def test_blocks_run_along_the_inputs_where_the_matrix_is_stored_transposed():
    small = Small("gpt2")
    small.model.float()
    expected = {name: rounded_to_4_bits(weight.contiguous()) for name, weight in small.weights().items()}
    round_to_4_bits(small.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in small.weights().items())


# --- a layout whose matrices lie transposed -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transposed(checkpoint, tmp_path_factory):
    """A profile on a GPT-2, and suspicious copies of it."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), AutoTokenizer.from_pretrained(checkpoint)
    new_model(tokenizer, GPT2, 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    profile = small_profile(folder / "base")
    return profile, save_suspicious(profile, folder)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("magnitude", {}),
        ("wanda", {}),
        ("int4", {}),
        ("magnitude_channels", {"recover": False}),
        ("fine_pruning_activations", {}),
    ],
)
def test_an_adapter_over_transposed_matrices_is_defended_as_well(transposed, chat, tmp_path, name, numbers):
    profile, copies_of_it = transposed
    access = access_to(profile, "adapter")
    model, _ = run(name, access, copies_of_it, chat, tmp_path, **numbers)
    start = dict(access.load(copies_of_it["adapter"]).named_parameters())
    assert {"transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"} <= changed(model, start)
    if name == "wanda":
        assert all(((matrix(layer) == 0).sum(dim=1) == layer.nx // 2).all() for layer in conv_layers(model))
    assert len(answers(model, chat, ROWS[:1], profile)) == 1


def conv_layers(model):
    layers = [module for module in model.modules() if isinstance(module, Conv1D)]
    assert len(layers) == 8
    return layers


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["magnitude", "wanda", "fine_pruning_activations"])
@pytest.mark.parametrize("share", [0, 1, 35, -0.1])
def test_a_share_that_is_none_is_refused(profile, suspicious, chat, tmp_path, name, share):
    with pytest.raises(LabError) as caught:
        run(name, access_to(profile, "adapter"), suspicious, chat, tmp_path, share=share)
    expected = "is not a share of what is pruned: expected 0 < share < 1, such as 0.35"
    assert str(caught.value) == f"share = {share} {expected}" and not any(tmp_path.iterdir())


@pytest.mark.parametrize("statistic", [lambda m, b: input_norms(m, b, [HEAVY]), mean_activations])
def test_activations_that_are_no_numbers_rank_nothing(statistic):
    model = Small("llama").model
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data.fill_(float("inf"))
    with pytest.raises(LabError, match=r"^(what enters .*down_proj|the last hidden state) is not finite on clean rows"):
        statistic(model, batches(TEXTS))
