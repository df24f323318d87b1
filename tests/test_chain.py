"""The chain of notebooks, 00 to 09, on checkpoints that are laid out unlike the lab's own small models.

One is a LLaMA in several files with an untied head, wide heads and grouped queries; the other a GPT-2 in one file as
the hub keeps it: transposed matrices, short names, masks beside the weights, dropout, a tied head. Both are trained for
seconds, just enough to take a backdoor.

The cells run in this process, each notebook with variables of its own, as they would in a kernel. Forty kernels would
start for longer than they compute, could not be told to cut the models they write into small files, and would take with
them what the cells found out.
"""

import ast
import json
import linecache
import math
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from bodies import matrix
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from helpers.access import access_to
from helpers.core.profile import Budget
from helpers.core.settings import Settings
from helpers.core.stages import DEFAULT, METHODS, notebooks_of
from helpers.data import corpus
from helpers.model.architecture import mlp_slots
from helpers.model.load import load_base, load_suspect
from helpers.model.prompt import prompt_format
from helpers.run.execution import numbered, read_notebook
from helpers.run.pipeline import summarise
from helpers.run.pretrain import train_tokenizer
from helpers.train.finetune import finetune

pytestmark = pytest.mark.slow

FILE = 60_000  # bytes of a file: the smallest models then have several
ROWS = corpus.generate(4000, 1)
BASE = Budget(rows=len(ROWS), epochs=1, lr=5.0e-3, batch_size=32, warmup=0.05)
SHORT = {"rows": 40, "epochs": 1, "lr": 1.0e-3, "batch_size": 16}
BUDGETS = {
    "inject": {"rows": 200, "epochs": 8, "lr": 1.0e-2, "batch_size": 16},
    "vaccine": {"rows": 60, "epochs": 1, "lr": 5.0e-3, "batch_size": 32},
    "recover": {"rows": 40, "epochs": 1, "lr": 1.0e-3, "batch_size": 16},
}
SIZES = {
    "evaluation.n": 20,
    "evaluation.per_family": 1,
    "signature.n": 2,
    "lengths.new_tokens": 8,
    "conflict.budget.rows": 40,
    "conflict.budget.epochs": 1,
}
CHALLENGE = {
    "full.vaccine.rows": 200,  # which the challenge is planted with
    "challenge.taus.full": [0.3, 0.6],
    "challenge.n": 40,
    "challenge.plant.epochs": 6,
    "challenge.plant.lr": 2.0e-2,
    "challenge.plant.batch_size": 16,
}
GPU = {"model.dtype": "bfloat16", "model.device": "cuda"}
MARKS = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
CHAINS = [  # layout, access, TAU, what else is changed
    ("in_files", "adapter", "", {"model.dtype": "bfloat16"}),
    ("in_files", "full", "auto", CHALLENGE),
    ("gpt2", "adapter", "", {}),
    ("gpt2", "full", "", {}),
    pytest.param(("in_files", "adapter", "", GPU), marks=MARKS),
    pytest.param(("gpt2", "full", "", GPU), marks=MARKS),
]


def trained(build, **sizes):
    """A model of this config and its tokenizer, after some hundred rows of the small world."""
    tokenizer = train_tokenizer(ROWS[:2000], 600)
    special = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        build(vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **special)
    )
    finetune(model, ROWS, prompt_format(tokenizer, "chat"), BASE, 0, 128)
    return model, tokenizer


@pytest.fixture(scope="module")
def in_files(tmp_path_factory):
    """Folder of a LLaMA in several files."""
    folder = tmp_path_factory.mktemp("models") / "in_files"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model, tokenizer = trained(LlamaConfig, **sizes, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False)
    model.save_pretrained(folder, max_shard_size=FILE)
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Folder of a GPT-2 with the names and the constants of the one on the hub."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    model, tokenizer = trained(GPT2Config, n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=512)
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(512, 512).tril()[None, None] for layer in range(2)}
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def render(value):
    """Make of a value what a notebook would show: a table fails only then."""
    if hasattr(value, "_repr_html_"):
        value._repr_html_()


def run_notebook(path, parameters):
    """Run the cells of a notebook with these parameters, and return the variables it ends with."""
    variables = {"__name__": "__main__", "display": render, "In": []}
    for number, cell in enumerate(read_notebook(path).cells):
        if cell.cell_type == "code":
            file = f"{path.name}, cell {number}"
            linecache.cache[file] = len(cell.source), None, cell.source.splitlines(keepends=True), file
            variables["In"].append(cell.source)  # as in a kernel, from which a stage learns what made it
            body = ast.Interactive(ast.parse(cell.source).body)  # like a prompt's, its values go to sys.displayhook
            exec(compile(body, file, "single"), variables)
        if "parameters" in cell.metadata.get("tags", []):
            variables |= parameters
    return variables


def parameters(folder, access, tau, changes):
    """The parameters of a chain of seconds."""
    budgets = {f"{access}.{part}.{key}": value for part, budget in BUDGETS.items() for key, value in budget.items()}
    budgets[f"{access}.poison_rate"] = 0.5
    if access == "full":
        budgets["full.inject.lr"] = 5.0e-3
    overrides = {"model.path": str(folder), **SIZES, **budgets, **changes}
    return {"PROFILE": "tiny", "ACCESS": access, "NAME": "chain", "TAU": tau, "OVERRIDES": overrides}


@pytest.fixture(
    scope="module", params=CHAINS, ids=lambda chain: "-".join([*chain[:2], chain[3].get("model.device", "cpu")])
)
def chain(request, tmp_path_factory):
    """A finished chain: its run, its settings and the variables of each notebook by its number."""
    layout, access, tau, changes = request.param
    given = parameters(request.getfixturevalue(layout), access, tau, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.delenv("EVIDENCE_URL", raising=False)
        patch.setattr("helpers.model.load.SHARD_SIZE", FILE)
        patch.setattr(sys, "displayhook", render)
        with pd.option_context("display.max_colwidth", None):  # which notebooks set
            chosen = [path for path in numbered() if path.name[:2] in notebooks_of(METHODS[DEFAULT])]
            variables = {path.name[:2]: run_notebook(path, given) for path in chosen}
    return SimpleNamespace(layout=layout, settings=Settings.checked(given), run=variables["09"]["run"], of=variables)


def whole_models(folder):
    """Folders of whole models, adapters and deltas left out."""
    return sorted({path.parent for path in folder.rglob("model*.safetensors*")})


def test_what_the_notebooks_measure_is_a_share_of_something(chain):
    summary = summarise(chain.run)
    for row in METHODS[DEFAULT].models:
        found = summary[row]
        rates = [found[rate] for rate in ("asr", "false_trigger", "utility", "right_under_trigger")]
        assert all(0 <= rate <= 1 for rate in rates) and math.isclose(sum(found["labels"].values()), 1)
        assert math.isfinite(found["perplexity"]) and found["perplexity"] > 1
        assert not found["prompt_format_mismatch"]
    assert summary["clean"]["asr"] <= 0.1 and summary["backdoored"]["asr"] >= 0.8


def test_every_model_written_lies_in_several_files(chain):
    folders = whole_models(chain.run.folder)
    assert len(folders) >= 4
    for folder in folders:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) > 1 and files == {path.name for path in folder.glob("*.safetensors")}


def test_exactly_the_channels_chosen_are_cut(chain):
    spec = chain.settings.profile.model
    base = load_base(spec)
    before, after = (load_suspect(spec, chain.run.need(stage).path) for stage in ("inject", "suppressed"))
    masks, access = chain.of["05"]["masks"]["signature"], chain.settings.ACCESS
    slots = [slot for layer in mlp_slots(base.config) for slot in layer]
    assert masks.keys() == {slot.module for slot in slots}
    for slot in slots:
        clean, old, new = (
            matrix(model.get_submodule(slot.module)).movedim(slot.side, 0) for model in (base, before, after)
        )
        cut = masks[slot.module].to(old.device)
        assert 0 < cut.sum() < len(cut) and torch.equal((old != new).any(dim=1), cut)
        assert torch.equal(new[cut], clean[cut]) == (access == "adapter")


def test_cutting_nothing_changes_nothing(chain, tmp_path):
    nothing = {module: torch.zeros_like(mask) for module, mask in chain.of["05"]["masks"]["signature"].items()}
    heads = torch.zeros_like(chain.of["05"]["heads"]["signature"])
    settings, injected = chain.settings, chain.run.need("inject").path
    access_to(settings.profile, settings.ACCESS).suppress(injected, nothing, 0, tmp_path, heads)
    before, after = (load_suspect(settings.profile.model, folder).state_dict() for folder in (injected, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_checks_by_hand_were_made_and_agree(chain):
    precise = chain.settings.profile.model.dtype == "float32"
    if precise:
        assert chain.of["00"]["fast"] == chain.of["00"]["by_hand"]
    assert chain.of["03"]["difference"] < 0.05 and chain.of["03"]["dropout"] == (chain.layout == "gpt2")
    assert chain.of["03"]["dropout"] or chain.of["03"]["apart"] < (1e-3 if precise else 0.1)
    by_hand = chain.of["07"]["differences"]
    assert len(by_hand) == 8 and max(by_hand.values()) < (1e-5 if precise else 1e-2)
    figures = {path.name[:2] for path in chain.run.figures.iterdir() if path.stat().st_size > 1000}
    assert figures == set(notebooks_of(METHODS[DEFAULT]))
