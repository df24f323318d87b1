"""Gram matrices against deltas written out in float64, channel by channel; memory of the stream measured."""

import json
import subprocess
import sys
import textwrap
from fractions import Fraction

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from helpers.access.deltas import (
    Factors,
    adapter_pairs,
    factor_gram,
    full_gram,
    lora_delta,
    lora_factors,
    lora_gram,
    model_pairs,
    slot_gram,
    weight_gram,
)
from helpers.core.errors import LabError
from helpers.model.architecture import Slot

R, IN, OUT, N = 3, 20, 14, 4
SLOT = Slot("model.layers.0.mlp.gate_proj", 0)


def oracle(deltas, axis):
    """⟨Δ_i,j, Δ_l,j⟩ by loops over written-out float64 matrices."""
    channels = deltas[0].shape[axis]
    gram = torch.zeros(len(deltas), len(deltas), channels, dtype=torch.float64)
    for i, first in enumerate(deltas):
        for l, second in enumerate(deltas):  # noqa: E741
            for j in range(channels):
                gram[i, l, j] = torch.dot(first.select(axis, j), second.select(axis, j))
    return gram


def dense(bd, clean):
    return bd.scale * bd.B.double() @ bd.A.double() - clean.scale * clean.B.double() @ clean.A.double()


def random_factors(generator, scale=2.0):
    return Factors(torch.randn(R, IN, generator=generator), torch.randn(OUT, R, generator=generator), scale)


def twins(distance, seed=0, scale=2.0):
    """N pairs of float32 LoRA updates whose members differ by about `distance`, relatively."""
    generator = torch.Generator().manual_seed(seed)
    clean = [random_factors(generator, scale) for _ in range(N)]
    noise = [random_factors(generator) for _ in range(N)]
    bd = [Factors(c.A + distance * n.A, c.B + distance * n.B, scale) for c, n in zip(clean, noise, strict=True)]
    return bd, clean


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-6])
def test_lora_gram_equals_written_out_deltas(axis, distance):
    bd, clean = twins(distance)
    expected = oracle([dense(*pair) for pair in zip(bd, clean, strict=True)], axis)
    size = expected.abs().max()
    torch.testing.assert_close(lora_gram(bd, clean, axis) / size, expected / size, rtol=1e-7, atol=1e-9)


def test_twins_that_differ_in_their_last_bit_keep_their_digits():
    """Against exact rational arithmetic; inner products of [B, -B'] and [A; A'], without the mean, lose some."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(R, 6, generator=generator), torch.randn(1, R, generator=generator)
    bd, clean = Factors(a, torch.nextafter(b, b + 1)), Factors(a, b)
    step = [Fraction(x) - Fraction(y) for x, y in zip(bd.B[0].tolist(), b[0].tolist(), strict=True)]
    delta = [sum(s * Fraction(x) for s, x in zip(step, column, strict=True)) for column in a.T.tolist()]
    exact = pytest.approx(float(sum(value**2 for value in delta)), rel=1e-12, abs=0)
    plain = Factors(torch.cat([bd.A, clean.A]), torch.cat([bd.B, -clean.B], dim=1))
    assert lora_gram([bd], [clean], 0).item() == exact
    assert factor_gram([plain], 0).item() != exact


def test_identical_twins_have_no_delta_at_all():
    bd, _ = twins(1.0)
    assert not lora_gram(bd, bd, 0).any()
    assert not lora_gram(bd, bd, 1).any()


def test_delta_is_the_difference_also_at_different_scales():
    generator = torch.Generator().manual_seed(3)
    bd, clean = random_factors(generator, 2.0), random_factors(generator, 0.5)
    delta = lora_delta(bd, clean)
    assert delta.A.shape == (2 * R, IN) and delta.B.shape == (OUT, 2 * R)
    torch.testing.assert_close(delta.B @ delta.A, dense(bd, clean))


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that torch makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_full_size_matrix_is_ever_made():
    """The deltas here would be 1500 x 1400."""
    pair = [Factors(torch.randn(2, 1400), torch.randn(1500, 2)) for _ in range(2)]
    with LargestTensor() as watched:
        lora_gram([pair[0]] * 2, [pair[1]] * 2, 0)
    assert 0 < watched.elements < 1500 * 1400 / 10
    with LargestTensor() as watched:
        dense(*pair)
    assert watched.elements == 1500 * 1400


@pytest.mark.parametrize("axis", [0, 1])
def test_weight_gram_of_matrix_and_factors_agree(axis):
    factors = random_factors(torch.Generator().manual_seed(5))
    matrix = factors.scale * factors.B.double() @ factors.A.double()
    torch.testing.assert_close(weight_gram(factors, axis), oracle([matrix], axis))
    torch.testing.assert_close(weight_gram(matrix, axis), oracle([matrix], axis))
    assert torch.equal(weight_gram(factors, axis), factor_gram([factors], axis))


def test_twins_of_different_rank_are_refused():
    with pytest.raises(LabError, match=r"twins must share one LoRA shape: A \[3, 20\] and \[2, 20\]"):
        lora_gram([Factors(torch.ones(3, 20), torch.ones(14, 3))], [Factors(torch.ones(2, 20), torch.ones(14, 2))], 0)


# --- adapters as PEFT writes them ---------------------------------------------------------------------------------


def save_lora(folder, **settings):
    """A PEFT adapter with random factors; returns the updates that PEFT itself computes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes))
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["gate_proj", "down_proj"]} | settings
    model = get_peft_model(base, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    layers = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {
        name: m.get_delta_weight("default").detach() for name, m in layers.items() if hasattr(m, "get_delta_weight")
    }


PATTERNS = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_proj": 3, "layers.0.mlp.down_proj": 5}}


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, *({key: value} for key, value in PATTERNS.items()), PATTERNS | {"use_rslora": True}],
)
def test_lora_factors_give_pefts_own_update(tmp_path, settings):
    expected = save_lora(tmp_path, **settings)
    factors = lora_factors(tmp_path)
    assert factors.keys() == expected.keys() == {SLOT.module, "model.layers.0.mlp.down_proj"}
    for module, (a, b, scale) in factors.items():
        torch.testing.assert_close(scale * b @ a, expected[module])


def test_factors_of_transposed_layers_are_still_outputs_by_inputs(tmp_path):
    """GPT-2 stores weights as [in, out]; `fan_in_fan_out` says so, and PEFT's own update is transposed."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_inner=24, n_layer=1, n_head=2))
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["c_fc"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(**options, fan_in_fan_out=True))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    update = layer.get_delta_weight("default").detach()
    [(name, factors)] = lora_factors(tmp_path).items()
    slot = Slot(name, 0, transposed=True)
    assert name == "transformer.h.0.mlp.c_fc" and update.shape == (16, 24)
    torch.testing.assert_close((factors.scale * factors.B @ factors.A).T, update)
    by_hand = oracle([update.double()], 1)
    torch.testing.assert_close(slot_gram(factors, slot), by_hand, rtol=1e-5, atol=0)
    torch.testing.assert_close(slot_gram(update, slot), by_hand)
    same = adapter_pairs([tmp_path], [tmp_path])(slot)
    assert same.shape == (1, 1, 24) and not same.any()


@pytest.mark.parametrize("settings, found", [({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias")])
def test_other_adapters_are_refused(tmp_path, settings, found):
    save_lora(tmp_path, **settings)
    with pytest.raises(LabError, match=rf"is not a plain LoRA adapter \(found {found}\)"):
        lora_factors(tmp_path)


def test_a_folder_without_safetensors_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(
        LabError, match="holds no adapter_model.safetensors; only PEFT adapters in safetensors are read"
    ):
        lora_factors(tmp_path)


def test_an_adapter_without_the_matrix_is_refused(tmp_path):
    save_lora(tmp_path)
    with pytest.raises(LabError, match=r"no LoRA on model.layers.0.mlp.up_proj; it adapts down_proj, gate_proj"):
        adapter_pairs([tmp_path], [tmp_path])(Slot("model.layers.0.mlp.up_proj", 0))


@pytest.mark.parametrize("pairs", [adapter_pairs, model_pairs])
@pytest.mark.parametrize("bd, clean", [(["a", "b"], ["c"]), ([], [])])
def test_incomplete_pairs_are_refused(pairs, bd, clean):
    with pytest.raises(LabError, match=rf"got {len(bd)} backdoored and {len(clean)} clean folders; notebook 03"):
        pairs(bd, clean)


# --- full models, streamed ----------------------------------------------------------------------------------------


def save_models(root, dtype=torch.float32, shape=(170, 33), sharded=False, n=3, names=("gate", "down")):
    """2N folders of random models as save_pretrained lays them out; returns folders and written-out deltas."""
    generator = torch.Generator().manual_seed(0)
    folders, deltas = {"bd": [], "clean": []}, {name: [] for name in names}
    for i in range(n):
        clean = {name: torch.randn(shape, generator=generator).to(dtype) for name in names}
        bd = {name: (w.float() + 1e-3 * torch.randn(shape, generator=generator)).to(dtype) for name, w in clean.items()}
        for kind, tensors in (("bd", bd), ("clean", clean)):
            folders[kind].append(root / f"{i}-{kind}")
            save_model(folders[kind][-1], tensors, sharded)
        for name in names:
            deltas[name].append(bd[name].double() - clean[name].double())
    return folders["bd"], folders["clean"], deltas


def save_model(folder, tensors, sharded):
    folder.mkdir(parents=True)
    if not sharded:
        return save_file(tensors, folder / "model.safetensors")
    files = {name: f"model-{i}-of-{len(tensors)}.safetensors" for i, name in enumerate(tensors)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_gram_equals_written_out_deltas(tmp_path, axis, sharded, dtype):
    bd, clean, deltas = save_models(tmp_path, dtype, sharded=sharded)
    torch.testing.assert_close(full_gram(bd, clean, "down", axis), oracle(deltas["down"], axis), rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_blocks_cover_every_row_once(tmp_path, rows):
    bd, clean, deltas = save_models(tmp_path, shape=(rows, 2), n=1)
    for axis in (0, 1):
        torch.testing.assert_close(full_gram(bd, clean, "gate", axis), oracle(deltas["gate"], axis))


def test_a_missing_tensor_is_named(tmp_path):
    bd, clean, _ = save_models(tmp_path, n=1)
    with pytest.raises(LabError, match=r"0-bd has no tensor 'gate_'; did you mean 'gate'\?"):
        full_gram(bd, clean, "gate_", 0)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tensor_is_found_without_the_models_prefix(tmp_path, sharded):
    """As GPT-2 lies on the hub."""
    bd, clean, deltas = save_models(tmp_path, names=("h.0.gate", "h.0.down"), sharded=sharded)
    torch.testing.assert_close(full_gram(bd, clean, "transformer.h.0.down", 0), oracle(deltas["h.0.down"], 0))


def test_a_missing_tensor_of_a_sharded_model_is_named(tmp_path):
    bd, clean, _ = save_models(tmp_path, n=1, sharded=True)
    with pytest.raises(LabError, match="has no tensor 'up'"):
        full_gram(bd, clean, "up", 0)


def test_pickled_models_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(LabError, match="holds no model.safetensors; only models in safetensors are read"):
        full_gram([tmp_path], [tmp_path], "gate", 0)


def test_variants_of_different_shape_are_refused(tmp_path):
    for name, rows in (("bd", 3), ("clean", 4)):
        save_model(tmp_path / name, {"gate": torch.ones(rows, 2)}, sharded=False)
    with pytest.raises(LabError, match=r"hold gate in different shapes: \[\(3, 2\), \(4, 2\)\]"):
        full_gram([tmp_path / "bd"], [tmp_path / "clean"], "gate", 0)


NAMES = ("gate", "up", "down")
MEMORY_PROBE = """
    import sys, threading, time
    import psutil, torch
    from safetensors.torch import load_file
    from helpers.access.deltas import full_gram

    def tensors_at_peak(work, tensor_bytes):
        rss, done = psutil.Process().memory_info, threading.Event()
        before, samples = rss().rss, []
        def watch():
            while not done.is_set():
                samples.append(rss().rss)
                time.sleep(0.0005)
        thread = threading.Thread(target=watch); thread.start()
        kept = work()
        samples.append(rss().rss)
        done.set(); thread.join()
        return (max(samples) - before) / tensor_bytes

    torch.set_num_threads(1)
    small, large, n, tensor_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

    def folders(root, kind):
        return [f"{root}/{i}-{kind}" for i in range(n)]

    def stream(root, axis):
        return [full_gram(folders(root, "bd"), folders(root, "clean"), name, axis) for name in ("gate", "up", "down")]

    def whole(root):
        files = [f"{folder}/model.safetensors" for kind in ("bd", "clean") for folder in folders(root, kind)]
        return [tensor.clone() for file in files for tensor in load_file(file).values()]

    for axis in (0, 1):
        stream(small, axis)  # loads the libraries' code, which is no part of the stream
    print(tensors_at_peak(lambda: stream(large, 0), tensor_bytes))
    print(tensors_at_peak(lambda: stream(large, 1), tensor_bytes))
    print(tensors_at_peak(lambda: whole(large), tensor_bytes))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_stays_below_2n_plus_2_tensors(tmp_path, dtype):
    """Resident memory, mapped file pages included, of a process of its own; loading the models whole exceeds it."""
    n, shape = 2, (2048, 1024) if dtype == torch.float32 else (4096, 1024)
    small, large = tmp_path / "small", tmp_path / "large"
    save_models(small, dtype, (256, 64), n=n, names=NAMES)
    save_models(large, dtype, shape, n=n, names=NAMES)
    tensor_bytes = shape[0] * shape[1] * dtype.itemsize
    command = [sys.executable, "-c", textwrap.dedent(MEMORY_PROBE), *map(str, (small, large, n, tensor_bytes))]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    by_rows, by_columns, whole = map(float, output.split())
    assert 1 < by_rows <= 2 * n + 2 and 1 < by_columns <= 2 * n + 2
    assert whole > 2 * n + 2
