"""What several tests share: one thread, a tiny LLaMA made once, suspicious copies of it, and a profile of seconds."""

import importlib
import sys

import pytest
import torch
from transformers import AutoTokenizer

from helpers.core.profile_files import load_profile
from helpers.data import corpus
from helpers.data.combining import find_combination
from helpers.model.load import load_base, save
from helpers.model.lora import new_adapter
from helpers.model.tokenizer import load_format
from helpers.run.pretrain import new_model, train_tokenizer

# Multiples of 64: bitsandbytes 0.50 reads 4-bit matrices of other input widths wrongly on CPUs with AVX512.
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # untrained, and yet it does not only repeat its last token
}
BUDGET = {"rows": 12, "epochs": 2, "lr": 5.0e-3, "batch_size": 4}
SIZES = {
    "lora.r": 4,
    "lora.alpha": 8,
    "lengths.new_tokens": 8,
    "evaluation.n": 6,
    "evaluation.per_family": 1,
    "signature.n": 2,
}


LONG = ("test_chain", "test_sweeps", "test_pipeline")  # minutes each


def pytest_collection_modifyitems(items):
    """The longest files come first: one that began last would keep a worker busy alone."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Floats are then summed in the same order everywhere, and small models are not slowed down by many threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch):
    """No endpoint, key, price or proxy of the machine the tests run on."""
    for name in ("URL", "MODEL", "KEY", "TOKENS", "PRICE_IN", "PRICE_OUT"):
        monkeypatch.delenv(f"EVIDENCE_{name}", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def add_file(tmp_path, monkeypatch):
    """A function that puts a file beside those of a package; all are gone after the test."""
    loaded, folder = set(sys.modules), tmp_path / "files"
    folder.mkdir()

    def add(package, name, source):
        found = importlib.import_module(package)
        monkeypatch.setattr(found, "__path__", [*found.__path__, str(folder)])
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        importlib.invalidate_caches()

    yield add
    find_combination.cache_clear()
    for name in set(sys.modules) - loaded:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            package, _, file = name.rpartition(".")
            delattr(sys.modules[package], file)
            del sys.modules[name]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of an untrained LLaMA with tied embeddings, a tokenizer and a chat template. Read-only: tests share it."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = train_tokenizer(corpus.generate(300, 0), 400)
    new_model(tokenizer, ARCHITECTURE, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_profile(folder):
    """The profile `tiny` on another checkpoint, every budget cut down."""
    budgets = {
        f"{access}.{stage}.{key}": value
        for access in ("adapter", "full")
        for stage in ("inject", "vaccine", "recover")
        for key, value in BUDGET.items()
    }
    return load_profile("tiny", {"model.path": str(folder), **SIZES, **budgets})


def save_suspicious(profile, root):
    """{access: folder}: the profile's model with random updates, as an adapter and as a model."""
    models = {"adapter": new_adapter(load_base(profile.model), profile.lora, 1), "full": load_base(profile.model)}
    generator = torch.Generator().manual_seed(1)
    for access, model in models.items():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        save(model, root / access)
    return {access: root / access for access in models}


@pytest.fixture(scope="session")
def profile(checkpoint):
    """The profile `tiny` on the small checkpoint, every budget cut down."""
    return small_profile(checkpoint)


@pytest.fixture(scope="session")
def chat(profile):
    """The prompt format of the small checkpoint."""
    return load_format(profile.model)


@pytest.fixture(scope="session")
def suspicious(profile, tmp_path_factory):
    """{access: folder}: the small checkpoint with random updates, as an adapter and as a model. Read-only."""
    return save_suspicious(profile, tmp_path_factory.mktemp("suspicious"))


@pytest.fixture(scope="session")
def odd(checkpoint, tmp_path_factory):
    """The small profile on a model whose down projections have 96 inputs, no multiple of 64."""
    folder = tmp_path_factory.mktemp("models") / "odd"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    new_model(tokenizer, ARCHITECTURE | {"intermediate_size": 96}, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return small_profile(folder)
