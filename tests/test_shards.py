"""Checkpoints rewritten and scored in less memory than they take."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.core.errors import LabError
from helpers.model.shards import INDEX, rewrite, shards, stored

CEILING = """
import json, multiprocessing, resource, sys
import psutil, torch
from transformers import LlamaConfig
from helpers.model.architecture import mlp_slots
from helpers.core.profile_files import load_profile
from helpers.access.full import reinitialize
from helpers.access.deltas import model_pairs
from helpers.defenses.bdvax.score import score_mlp
torch.set_num_threads(1)
folder, allowance = sys.argv[1], int(sys.argv[2])
config = LlamaConfig(**json.load(open(folder + "/config.json")))
signature = load_profile("tiny").signature
torch.rand(64, 64) @ torch.rand(64, 64)
masks = {slot.module: torch.arange(config.intermediate_size) % 2 == 0 for layer in mlp_slots(config) for slot in layer}
def load():
    whole = [torch.empty(10_000_000).fill_(i) for i in range(8)]
def suppress():
    reinitialize(folder, folder + "-out", masks, config, 0)
def score():
    scores = score_mlp(model_pairs([folder + "-out", folder], [folder, folder + "-out"]), config, signature)
    print(json.dumps({"scored": sum(len(values) for values in scores.values())}))
def below(work):
    used = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (used + allowance, used + allowance))
    work()
for work in (load, suppress, score):  # each in a process of its own, which has imported all
    child = multiprocessing.get_context("fork").Process(target=below, args=(work,))
    child.start()
    child.join()
    print(json.dumps({work.__name__: child.exitcode}), flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A sharded model of 250 MB: twelve times 20 MB and an index."""
    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    config = {"hidden_size": 512, "intermediate_size": 3328, "num_hidden_layers": 12, "num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    index = {}
    for layer in range(12):
        prefix, generator = f"model.layers.{layer}.mlp.", torch.Generator().manual_seed(layer)
        shapes = {"gate_proj": (3328, 512), "up_proj": (3328, 512), "down_proj": (512, 3328)}
        tensors = {f"{prefix}{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
        name = f"model-{layer + 1:05}-of-00012.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def within(folder, megabytes):
    """What three processes tell that may take so much beyond their libraries, and their errors."""
    command = [sys.executable, "-c", CEILING, str(folder), str(megabytes * 1_000_000)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {key: value for line in done.stdout.splitlines() for key, value in json.loads(line).items()}, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts a process's own memory on Linux only")
def test_a_model_is_suppressed_and_scored_in_a_fraction_of_its_size(large):
    size = sum(path.stat().st_size for path in shards(large))
    assert size > 2 * 120e6
    told, errors = within(large, 120)
    assert told["load"] != 0  # the ceiling holds
    assert told["suppress"] == 0, errors[-500:]
    assert told["score"] == 0 and told["scored"] == 12 * 3 * 3328, errors[-500:]
    name = "model-00003-of-00012.safetensors"
    before, after = load_file(large / name), load_file(f"{large}-out/{name}")
    changed = before["model.layers.2.mlp.down_proj.weight"] != after["model.layers.2.mlp.down_proj.weight"]
    assert changed[:, ::2].float().mean() > 0.99 and not changed[:, 1::2].any()


def test_a_copy_is_the_same_file_by_file(large, tmp_path):
    rewrite(large, tmp_path / "copy", lambda name, tensor: tensor)
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted(p.name for p in large.iterdir())
    for path in shards(large):
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_what_lies_in_a_checkpoint_is_listed(large):
    found = dict(stored(large))
    assert len(found) == 36 and found["model.layers.11.mlp.down_proj.weight"] == [512, 3328]


def test_a_missing_shard_is_named(large, tmp_path):
    (tmp_path / INDEX).write_text((large / INDEX).read_text())
    with pytest.raises(LabError, match=r"holds no model-00001-of-00012.safetensors; only models in safetensors"):
        shards(tmp_path)
