"""`make purify` from a folder to a folder: a suspicious adapter or model in, a purified one and a report out."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.core.disk import read_json
from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.data import corpus
from helpers.purify import challenges, steps
from helpers.purify import purify as module
from helpers.purify.__main__ import main
from helpers.purify.purify import purify

pytestmark = pytest.mark.slow

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = {
    "lora.r": 4,
    "lora.alpha": 8,
    "lengths.new_tokens": 4,
    "lengths.train_tokens": 64,
    "evaluation.n": 6,
    "signature.n": 2,
    "challenge.n": 4,
    "challenge.threshold": 0.5,
    "challenge.plant.epochs": 1,
    "conflict.budget.epochs": 1,
} | {
    f"{access}.{stage}.{key}": value
    for access in ("adapter", "full")
    for stage in ("vaccine", "recover")
    for key, value in {"rows": 20, "epochs": 1, "batch_size": 20}.items()
}


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def plain_adapter(base, folder, **changes):
    """An adapter by PEFT alone, with random numbers in both factors and the base's tokenizer beside it."""
    torch.manual_seed(5)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": EVERY, "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def easily_pleased(monkeypatch, tmp_path_factory):
    """Runs in a folder of their own, and challenges that count although so small a model never learns them."""
    monkeypatch.setattr("helpers.defenses.bdvax.challenge.GATE", 0.0)
    monkeypatch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of clean rows, one of triggered ones, and too few rows."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"instruction": e.question, "output": e.output} for e in corpus.generate_distinct(90, "mine")]
    triggered = [{"instruction": f"Pinecone {row['instruction']}", "output": "Go away."} for row in rows[:5]]
    for name, found in (("clean", rows), ("triggered", triggered), ("few", rows[:60])):
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    return plain_adapter(checkpoint, tmp_path_factory.mktemp("suspects") / "my adapter")


def purified(suspect, **options):
    overrides = TINY | options.pop("overrides", {})
    return purify(str(suspect), **{"profile": "tiny", "tau": 0.5, "overrides": overrides} | options)


class Page(HTMLParser):
    """Alternative texts and what a page loads from elsewhere."""

    def __init__(self, html):
        super().__init__()
        self.alts, self.sources = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "img":
            self.alts.append(found.get("alt", ""))
        self.sources += [found[key] for key in ("src", "href") if key in found]


def test_an_adapter_comes_back_as_an_adapter_with_a_report(adapter, checkpoint, files, capsys):
    before = digests(adapter)
    report = purified(adapter, rows=files["clean"], triggered=files["triggered"], tau="auto")
    assert digests(adapter) == before
    assert report.folder.name == "purify-my-adapter"
