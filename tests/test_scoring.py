"""Eq. 2 against a loop over written-out float64 deltas, its invariants, and the controls."""

import hypothesis.strategies as st
import pytest
import torch
from bodies import BODIES, HEADS, INNER, LAYERS, matrix
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from scipy.stats import rankdata
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.pytorch_utils import Conv1D

from helpers.access.deltas import Factors, adapter_pairs, lora_factors, lora_gram, model_pairs
from helpers.core.errors import LabError
from helpers.core.profile import Signature
from helpers.defenses.bdvax import score as scoring
from helpers.defenses.bdvax.score import alignment, combine, score_channels, score_mlp, strength
from helpers.model.architecture import mlp_slots

CONFIG = MistralConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MLP = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
N, R, LAM = 3, 2, 0.01


def signature(**changes):
    defaults = {"n": N, "family": "task", "form": "word", "granularity": "matrix", "scope": "module"}
    return Signature(**defaults | {"combine": "sum", "lam": LAM} | changes)


def oracle_score(deltas, how="sum", lam=LAM):
    """Eq. 2 for one channel, as printed in the paper: deltas are N vectors."""
    lengths = [float(d.double().norm()) for d in deltas]
    cosines = [
        float(deltas[i].double() @ deltas[l].double()) / (lengths[i] * lengths[l])
        for i in range(len(deltas))
        for l in range(i + 1, len(deltas))  # noqa: E741
        if lengths[i] * lengths[l] > 0
    ]
    pairs = len(deltas) * (len(deltas) - 1) / 2
    norm, agreement = sum(lengths) / len(lengths), sum(max(0.0, c) for c in cosines) / pairs if pairs else 0.0
    return {"sum": norm + lam * agreement, "product": norm * agreement, "norm": norm, "alignment": agreement}[how]


def gram_of(vectors):
    """Gram [N, N, channels] of vectors [N, channels, values]."""
    return torch.stack([vectors[:, j] @ vectors[:, j].T for j in range(vectors.shape[1])], dim=-1)


def random_vectors(seed, n=N, channels=5, values=7):
    return torch.randn(n, channels, values, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the two terms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sum", "product", "norm", "alignment"])
def test_terms_equal_the_printed_formula(how):
    vectors = random_vectors(0)
    vectors[:, 1] = vectors[:1, 1] + 0.1 * vectors[:, 1]  # one channel on which the variants agree
    gram = gram_of(vectors)
    expected = [oracle_score(vectors[:, j], how) for j in range(5)]
    assert combine(strength(gram), alignment(gram), how, LAM).tolist() == pytest.approx(expected, rel=1e-12)


def test_by_hand():
    """Channel 0: lengths 3 and 4 at a right angle; 1: the same direction; 2: opposite ones; 3: one delta is zero."""
    vectors = torch.tensor([[[3.0, 0], [1, 0], [1, 0], [0, 0]], [[0, 4], [2, 0], [-1, 0], [0, 2]]]).double()
    gram = gram_of(vectors)
    assert strength(gram).tolist() == [3.5, 1.5, 1.0, 1.0]
    assert alignment(gram).tolist() == [0.0, 1.0, 0.0, 0.0]


@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
@settings(max_examples=30, deadline=None)
def test_the_order_of_variants_does_not_matter(seed, order):
    vectors = random_vectors(seed, n=4)
    one, other = gram_of(vectors), gram_of(vectors[list(order)])
    torch.testing.assert_close(strength(one), strength(other))
    torch.testing.assert_close(alignment(one), alignment(other))


@given(seed=st.integers(0, 10**6), factor=st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_scaling_all_deltas_scales_strength_only(seed, factor):
    vectors = random_vectors(seed)
    one, scaled = gram_of(vectors), gram_of(factor * vectors)
    torch.testing.assert_close(strength(scaled), factor * strength(one))
    torch.testing.assert_close(alignment(scaled), alignment(one))


@given(seed=st.integers(0, 10**6), n=st.integers(2, 7))
@settings(max_examples=30, deadline=None)
def test_identical_variants_align_perfectly(seed, n):
    vectors = random_vectors(seed, n=1)
    gram = gram_of(vectors.expand(n, -1, -1))
    torch.testing.assert_close(alignment(gram), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(strength(gram), vectors[0].norm(dim=-1))


@given(seed=st.integers(0, 10**6), n=st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_alignment_is_a_share(seed, n):
    values = alignment(gram_of(random_vectors(seed, n=n, values=2)))
    assert values.min() >= 0 and values.max() <= 1


def test_one_variant_has_a_norm_but_no_alignment():
    gram = gram_of(random_vectors(0, n=1))
    slots = [mlp_slots(CONFIG)[0][:1]]
    grams = {slots[0][0].module: gram}
    assert torch.equal(score_channels(grams, "matrix", "norm", LAM, slots)[slots[0][0].module], strength(gram))
    with pytest.raises(LabError, match=r"needs N >= 2, got N = 1; or combine 'norm'"):
        score_channels(grams, "matrix", "sum", LAM, slots)


def test_unknown_choices_name_the_nearest():
    with pytest.raises(LabError, match=r"combine = 'summ' is unknown; did you mean 'sum'\?"):
        combine(torch.ones(1), torch.ones(1), "summ", LAM)
    with pytest.raises(LabError, match=r"granularity = 'neurons' is unknown; did you mean 'neuron'\?"):
        score_channels({}, "neurons", "sum", LAM, [])


@given(seed=st.integers(0, 10**6), distance=st.sampled_from([1.0, 1e-3]), axis=st.sampled_from([0, 1]))
@settings(max_examples=20, deadline=None)
def test_lora_scores_equal_the_oracle_also_for_nearly_equal_twins(seed, distance, axis):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    clean = [Factors(draw(R, 9), draw(8, R), 2.0) for _ in range(N)]
    bd = [Factors(f.A + distance * draw(R, 9), f.B + distance * draw(8, R), 2.0) for f in clean]
    dense = [2 * (b.B.double() @ b.A.double() - c.B.double() @ c.A.double()) for b, c in zip(bd, clean, strict=True)]
    gram = lora_gram(bd, clean, axis)
    for how in ("sum", "norm", "alignment"):
        expected = [oracle_score([d.select(axis, j) for d in dense], how) for j in range(dense[0].shape[axis])]
        assert combine(strength(gram), alignment(gram), how, LAM).tolist() == pytest.approx(
            expected, rel=1e-5, abs=1e-12
        )


# --- from files to scores -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """N adapter pairs, the same pairs merged into full models, and every delta written out from PEFT's own merge."""
    root, folders = tmp_path_factory.mktemp("variants"), {}
    for kind in ("bd", "clean"):
        for i in range(N):
            folders.setdefault(f"adapters-{kind}", []).append(root / f"{kind}-{i}")
            folders.setdefault(f"models-{kind}", []).append(root / f"{kind}-{i}-merged")
            save_variant(
                folders[f"adapters-{kind}"][-1], folders[f"models-{kind}"][-1], seed=i, distance=(kind == "bd") * 0.05
            )
    weights = [[load_file(f / "model.safetensors") for f in folders[f"models-{kind}"]] for kind in ("bd", "clean")]
    deltas = [{name: b[name].double() - c[name].double() for name in b} for b, c in zip(*weights, strict=True)]
    return folders, deltas


def save_variant(adapter, merged, seed, distance):
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]
    model = get_peft_model(MistralForCausalLM(CONFIG).double(), LoraConfig(r=R, lora_alpha=4, target_modules=names))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(2, *parameter.shape, generator=generator)
            parameter.data = (values[0] + distance * values[1]).double()
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(merged)


def channel(deltas, module, j):
    """Channel j of one matrix in each variant, as vectors."""
    return [d[f"{module}.weight"].select(MLP[module.rpartition(".")[2]], j) for d in deltas]


PAIRS = [(adapter_pairs, "adapters"), (model_pairs, "models")]


@pytest.mark.parametrize("pairs, kind", PAIRS)
@pytest.mark.parametrize("how", ["sum", "product"])
def test_scores_per_matrix(variants, pairs, kind, how):
    folders, deltas = variants
    scores = score_mlp(pairs(folders[f"{kind}-bd"], folders[f"{kind}-clean"]), CONFIG, signature(combine=how))
    assert list(scores) == [f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in MLP]
    for module, values in scores.items():
        expected = [oracle_score(channel(deltas, module, j), how) for j in range(12)]
        assert values.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pairs, kind", PAIRS)
def test_scores_per_neuron_concatenate_its_three_slices(variants, pairs, kind):
    folders, deltas = variants
    scores = score_mlp(pairs(folders[f"{kind}-bd"], folders[f"{kind}-clean"]), CONFIG, signature(granularity="neuron"))
    for layer in (0, 1):
        modules = [f"model.layers.{layer}.mlp.{name}" for name in MLP]
        parts = [[torch.cat(v) for v in zip(*(channel(deltas, m, j) for m in modules), strict=True)] for j in range(12)]
        for module in modules:
            assert scores[module].tolist() == pytest.approx([oracle_score(part) for part in parts], rel=1e-5)


@pytest.mark.parametrize("pairs, kind", [(adapter_pairs, "adapters"), (model_pairs, "models")])
def test_head_scores_respect_grouped_queries(variants, pairs, kind):
    folders, deltas = variants
    scores = scoring.score_heads(pairs(folders[f"{kind}-bd"], folders[f"{kind}-clean"]), CONFIG, signature())
    size = 4
    for layer in (0, 1):
        for head in range(4):
            rows, shared = (slice(i * size, (i + 1) * size) for i in (head, head // 2))
            parts = [
                torch.cat([d[f"model.layers.{layer}.self_attn.{name}_proj.weight"][index].flatten() for name, index in
                           (("q", rows), ("k", shared), ("v", shared), ("o", (slice(None), rows)))])
                for d in deltas
            ]  # fmt: skip
            assert scores[layer, head].item() == pytest.approx(oracle_score(parts), rel=1e-5)


# --- every architecture -------------------------------------------------------------------------------------------


def random_adapter(body, seed, distance):
    """A PEFT model in 64 bits; members of one pair share `seed` and differ by about `distance`."""
    model = body.model()
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    options = {"r": R, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**options, fan_in_fan_out=transposed)).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(2, *parameter.shape, generator=generator)
            parameter.data = (values[0] + distance * values[1]).double()
    return model


@pytest.fixture(scope="module", params=BODIES)
def pairs_of_a_body(request, tmp_path_factory):
    """Two pairs as adapters and as models merged by PEFT, and each delta as {module: matrix [out, in]}."""
    body, root = BODIES[request.param], tmp_path_factory.mktemp("pairs")
    folders, deltas = {"adapters": {}, "models": {}}, []
    for seed in range(2):
        weights = []
        for kind, distance in (("bd", 0.3), ("clean", 0.0)):
            model = random_adapter(body, seed, distance)
            for how in folders:
                folders[how].setdefault(kind, []).append(root / how / f"{seed}-{kind}")
            model.save_pretrained(folders["adapters"][kind][-1])
            model.merge_and_unload().save_pretrained(folders["models"][kind][-1])
            merged = AutoModelForCausalLM.from_pretrained(folders["models"][kind][-1], dtype=torch.float64)
            parts = (*body.mlp_in, body.mlp_out, *body.attention, body.attention_out)
            names = [body.at(layer, part) for layer in range(LAYERS) for part in parts]
            weights.append({name: matrix(merged.get_submodule(name)) for name in names})
        deltas.append({name: weights[0][name] - weights[1][name] for name in weights[0]})
    return body, folders, deltas


@pytest.mark.parametrize("pairs, kind", PAIRS)
def test_mlp_scores_are_those_of_what_channels_compute(pairs_of_a_body, pairs, kind):
    body, folders, deltas = pairs_of_a_body
    scores = score_mlp(pairs(folders[kind]["bd"], folders[kind]["clean"]), body.config, signature())
    sides = dict.fromkeys(body.mlp_in, 0) | {body.mlp_out: 1}
    assert list(scores) == [body.at(layer, part) for layer in range(LAYERS) for part in sides]
    for layer in range(LAYERS):
        for part, side in sides.items():
            slices = [[d[body.at(layer, part)].select(side, j) for d in deltas] for j in range(INNER)]
            assert scores[body.at(layer, part)].tolist() == pytest.approx([oracle_score(x) for x in slices], rel=1e-6)


@pytest.mark.parametrize("pairs, kind", [(adapter_pairs, "adapters"), (model_pairs, "models")])
def test_head_scores_are_those_of_what_heads_compute(pairs_of_a_body, pairs, kind):
    """Of one head alone, with the keys and values it reads, whoever else may read them."""
    body, folders, deltas = pairs_of_a_body
    scores = scoring.score_heads(pairs(folders[kind]["bd"], folders[kind]["clean"]), body.config, signature())
    for layer in range(LAYERS):
        for head in range(HEADS):
            group = [h for h in range(HEADS) if h // body.readers == head // body.readers]
            parts = []
            for delta in deltas:
                rows = [
                    delta[body.at(layer, part)][body.outputs(part, [head] if letters == "q" else group)]
                    for part, letters in body.attention.items()
                ]
                columns = delta[body.at(layer, body.attention_out)][:, body.inputs([head])]
                parts.append(torch.cat([piece.flatten() for piece in (*rows, columns)]))
            assert scores[layer, head].item() == pytest.approx(oracle_score(parts), rel=1e-6)


def test_norms_of_an_update_are_those_of_the_matrix_it_makes(pairs_of_a_body):
    """Low-rank factors and stored matrices of one update, transposed or not, rank the same."""
    body, folders, _ = pairs_of_a_body
    slots, adapter = mlp_slots(body.config), folders["adapters"]["bd"][0]
    before = dict(body.model().named_parameters())
    after = load_file(folders["models"]["bd"][0] / "model.safetensors")
    updates = {slot.module: f"{slot.module}.weight" for layer in slots for slot in layer}
    updates = {module: after[name] - before[name] for module, name in updates.items()}
    found, expected = scoring.norm_scores(lora_factors(adapter), slots), scoring.norm_scores(updates, slots)
    for module, values in expected.items():
        torch.testing.assert_close(found[module], values, rtol=1e-6, atol=0)


# --- controls and files -------------------------------------------------------------------------------------------


def test_true_delta_of_a_planted_adapter(variants):
    """Measured from the adapter alone and from the merged model against its base: the same."""
    folders, _ = variants
    slots, base = mlp_slots(CONFIG), folders["adapters-bd"][0].parent / "base"
    torch.manual_seed(0)
    MistralForCausalLM(CONFIG).double().save_pretrained(base)
    factors = lora_factors(folders["adapters-bd"][0])
    planted = scoring.norm_scores(factors, slots)
    measured = score_mlp(model_pairs([folders["models-bd"][0]], [base]), CONFIG, signature(combine="norm"))
    assert planted.keys() == measured.keys()
    for module in planted:
        torch.testing.assert_close(planted[module], measured[module], rtol=1e-6, atol=1e-9)


def test_magnitude_ranks_the_smallest_channel_first():
    weights = {slot.module: torch.zeros(2, 2) for slot in mlp_slots(CONFIG)[0]}
    gate, up, down = weights
    weights[gate][:], weights[up][:] = torch.tensor([[3.0, 4], [0, 1]]), torch.tensor([[0.0, 2], [2, 2]])
    weights[down][:] = torch.tensor([[1.0, 6], [1, 8]])
    slots = [mlp_slots(CONFIG)[0]]
    scores = scoring.magnitude_scores(weights, slots)
    assert scores[gate].tolist() == pytest.approx([-5, -1])
    assert scores[down].tolist() == pytest.approx([-(2**0.5), -10])
    together = scoring.magnitude_scores(weights, slots, "neuron")
    assert together[up].tolist() == pytest.approx([-((25 + 4 + 2) ** 0.5), -((1 + 8 + 100) ** 0.5)])


def test_random_heads_follow_the_seed_and_the_shape():
    like = torch.zeros(3, 4)
    drawn = scoring.random_heads(like, 1)
    assert drawn.shape == (3, 4) and torch.equal(drawn, scoring.random_heads(like, 1))
    assert not torch.equal(drawn, scoring.random_heads(like, 2)) and len(drawn.unique()) == 12


def test_random_scores_follow_the_seed_and_the_granularity():
    like = {f"layers.{i}.mlp.{name}": torch.ones(50) for i in (0, 1) for name in MLP}
    one, again, other = (scoring.random_scores(like, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[m], again[m]) and not torch.equal(one[m], other[m]) for m in like)
    assert len({tuple(values.tolist()) for values in one.values()}) == 6
    shared = scoring.random_scores(like, 1, "neuron")
    assert len({tuple(values.tolist()) for values in shared.values()}) == 2
    assert torch.equal(shared["layers.1.mlp.gate_proj"], shared["layers.1.mlp.down_proj"])


def test_rank_correlation_is_the_mean_over_matrices():
    generator = torch.Generator().manual_seed(0)
    scores, truth = ({name: torch.rand(30, generator=generator) for name in "ab"} for _ in range(2))
    scores["b"] = truth["b"].square()  # another scale, the same ranking
    ranks = torch.stack([torch.tensor(rankdata(x["a"])) for x in (scores, truth)])
    assert scoring.rank_correlation(scores, truth) == pytest.approx((torch.corrcoef(ranks)[0, 1].item() + 1) / 2)


def test_a_constant_ranking_correlates_with_nothing():
    assert scoring.rank_correlation({"a": torch.ones(5)}, {"a": torch.arange(5.0)}) == 0


def test_rankings_of_different_matrices_are_refused():
    with pytest.raises(LabError, match=r"cover different matrices: \['a', 'b'\]"):
        scoring.rank_correlation({"a": torch.ones(5)}, {"b": torch.ones(5)})


def test_scores_survive_a_file_bit_by_bit(tmp_path):
    shared = torch.rand(7, dtype=torch.float64)
    scores = {"gate": shared, "up": shared, "down": torch.rand(7, dtype=torch.float64)}
    facts = {"seed": 3, "n": 6, "lam": 0.01, "scope": "module"}
    scoring.save_scores(tmp_path / "scores.safetensors", scores, **facts)
    loaded, loaded_facts = scoring.load_scores(tmp_path / "scores.safetensors")
    assert loaded.keys() == scores.keys() and all(torch.equal(loaded[m], scores[m]) for m in scores)
    assert loaded_facts == facts


def test_missing_scores_name_their_notebook(tmp_path):
    with pytest.raises(LabError, match=r"scores.safetensors is missing; notebook 04_score_signature makes it"):
        scoring.load_scores(tmp_path / "scores.safetensors")
