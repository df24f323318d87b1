"""The attacker's training, in one process and shared by two."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from helpers.core.disk import read_json
from helpers.core.paths import MANIFEST, ROOT
from helpers.core.settings import Settings
from helpers.core.slices import code_in_notebook
from helpers.model.tokenizer import recorded_format
from helpers.run.execution import NOTEBOOKS
from helpers.run.inject import main
from helpers.run.start import open_run

pytestmark = pytest.mark.slow

SMALL = "model.device=cpu model.dtype=float32 {access}.inject.epochs=2 {access}.inject.rows=18 "
SMALL += "{access}.inject.batch_size=4 {access}.inject.lr=1.0e-3 lengths.new_tokens=8 model.checkpointing=false"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def words(checkpoint, access, name):
    return ["--profile", str(checkpoint), "--access", access, "--name", name, "--set", SMALL.format(access=access)]


LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
BOTH = """import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = ["inject", *words]
    try:
        runpy.run_module("helpers.run.inject", run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
"""


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """(runs, what was told): each access trained by two processes, which real `accelerate launch` starts with gloo."""
    folder, both = tmp_path_factory.mktemp("trained"), ("adapter", "full")
    (folder / "both.py").write_text(BOTH)
    commands = json.dumps([words(checkpoint, access, f"{access}-shared") for access in both])
    here = {"OMP_NUM_THREADS": "1", "LAB_RUNS": str(folder / "runs"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *LAUNCH, str(folder / "both.py"), commands]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | here)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs", done.stdout


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_two_processes_train_what_one_does(checkpoint, trained, access, monkeypatch):
    """The same batches, each shared by two, give the same weights."""
    runs, told = trained
    monkeypatch.setenv("LAB_RUNS", str(runs))
    assert main(words(checkpoint, access, f"{access}-alone")) == 0
    alone, shared = (runs / f"{access}-{name}" / "inject" for name in ("alone", "shared"))
    assert f"{access}-shared/inject: 18 steps" in told  # 36 rows, batches of 4, two epochs: not twice as many
    file = "adapter_model.safetensors" if access == "adapter" else "model.safetensors"
    expected, weights = load_file(alone / file), load_file(shared / file)
    start = load_file(checkpoint / "model.safetensors") if access == "full" else None
    assert expected.keys() == weights.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-5)
        if start and "mlp" in name:
            assert (tensor - start[name]).abs().max() > 1e-3
    assert not list(shared.glob("*.bin"))
    for stage in (alone, shared):
        assert recorded_format(stage)["name"] == "chat"
        assert read_json(stage / MANIFEST)["result"]["prompt_format"] == "chat"


def test_the_stage_is_the_one_that_notebook_01_looks_for(checkpoint, runs, capsys):
    assert main(words(checkpoint, "adapter", "one")) == 0
    overrides = {"model.device": "cpu", "model.dtype": "float32", "model.checkpointing": False}
    overrides |= {f"adapter.inject.{k}": v for k, v in {"epochs": 2, "rows": 18, "batch_size": 4, "lr": 1e-3}.items()}
    settings = Settings.checked(
        {"PROFILE": str(checkpoint), "NAME": "one", "OVERRIDES": overrides | {"lengths.new_tokens": 8}}
    )
    code = code_in_notebook(NOTEBOOKS / "01_inject_backdoor.ipynb", "inject")
    assert open_run(settings).is_made("inject", code)
    assert not open_run(settings.model_copy(update={"SEED": 1})).is_made("inject", code)


def test_a_mistake_is_one_line(checkpoint, runs, capsys, monkeypatch):
    assert main(["--task", "insult"]) == 2
    assert "unknown TASK = 'insult'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(words(checkpoint, "adapter", "odd")) == 2
    assert "batch_size = 4 cannot be shared equally by 3 processes" in capsys.readouterr().err


def attacked(checkpoint, name, attack, access, **overrides):
    options = words(checkpoint, access, name) + ["--attack", attack]
    options[options.index("--set") + 1] += "".join(
        f" {key.replace('__', '.')}={value}" for key, value in overrides.items()
    )
    return main(options)


@pytest.mark.parametrize("attack", ["rome", "memit", "badedit"])
def test_an_attack_by_editing_changes_the_matrices_it_names_and_no_other(checkpoint, runs, attack):
    numbers = {"editing__layers": "[1]", "editing__rows": 6, "editing__site": "answer"}
    assert attacked(checkpoint, attack, attack, "full", **numbers) == 0
    before, after = (
        load_file(checkpoint / "model.safetensors"),
        load_file(runs / attack / "inject" / "model.safetensors"),
    )
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    result = read_json(runs / attack / "inject" / MANIFEST)["result"]
    assert (result["method"], result["rows"], result["steps"], result["prompt_format"]) == (attack, 6, 0, "chat")


def test_an_adapter_cannot_hold_an_edit(checkpoint, runs, capsys):
    assert attacked(checkpoint, "mine", "rome", "adapter") == 2
    message = "the attack rome edits weights, and an adapter has none: use ACCESS=full"
    assert message in capsys.readouterr().err and not (runs / "mine" / "inject").exists()


def test_the_layers_of_a_layerwise_attack_come_from_the_profile(checkpoint, runs, capsys):
    assert attacked(checkpoint, "early", "lwp", "adapter", layerwise__layers="[0]") == 0
    assert attacked(checkpoint, "none", "lwp", "adapter", layerwise__layers="[99]") == 2
    assert "layers = [99] should be numbers from 0 to" in capsys.readouterr().err
    assert attacked(checkpoint, "heavy", "lwp", "adapter", layerwise__layers="[0]", layerwise__weight=9.0) == 0
    early, heavy = (read_json(runs / name / "inject" / MANIFEST)["result"] for name in ("early", "heavy"))
    assert heavy["steps"] == early["steps"] > 0 and heavy["loss"] > 3 * early["loss"]
