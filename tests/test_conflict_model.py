"""The conflict model, trained and written whole, and a first internal conflict from end to end."""

import hashlib

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers.access import access_to
from helpers.core.errors import LabError
from helpers.core.profile_files import load_profile
from helpers.data import corpus
from helpers.defenses.conflict.conflict_model import (
    merge_adapters,
    merge_to_suppress,
    train_conflict,
    write_conflict,
    write_suspicious,
)
from helpers.defenses.conflict.merge import linear
from helpers.measure.utility import teacher_forced
from helpers.model.load import load_base, load_suspect
from helpers.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

ROWS = corpus.generate(12, 6)
ADAPTER = "adapter_model.safetensors"


def with_conflict(profile, **changes):
    values = profile.model_dump()
    values["conflict"] |= {"budget": {"rows": 12, "epochs": 2, "lr": 5.0e-3, "batch_size": 4}} | changes
    return type(profile)(**values)


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.fixture(scope="module", params=["base", "suspicious"])
def settings(request, profile):
    """The profile, the conflict model trained from either start."""
    return with_conflict(profile, start=request.param)


@pytest.fixture(scope="module", params=["adapter", "full"])
def access(request):
    return request.param


@pytest.fixture(scope="module")
def trained(settings, access, suspicious, chat, tmp_path_factory):
    """The training record and folder of a conflict model."""
    folder, before = tmp_path_factory.mktemp("conflict") / "adapter", digests(suspicious[access])
    record = train_conflict(settings, suspicious[access], ROWS, chat, 0, folder)
    assert digests(suspicious[access]) == before
    return record, folder


def start(settings, suspicious):
    """What the conflict model is trained from."""
    from_suspicious = settings.conflict.start == "suspicious"
    return load_suspect(settings.model, suspicious) if from_suspicious else load_base(settings.model)


def perplexity(model, chat):
    return teacher_forced(model, chat, ROWS, 96, 12)["perplexity"]


def test_an_adapter_is_trained_with_its_own_budget(trained):
    record, folder = trained
    assert record["rows"] == 12 and record["steps"] == 2 * 12 // 4
    assert sorted(f.name for f in folder.iterdir()) == ["adapter_config.json", ADAPTER, "prompt_format.json"]
    assert all(tensor.any() for tensor in load_file(folder / ADAPTER).values())


def test_the_conflict_model_learns_the_rows(settings, access, suspicious, chat, trained):
    before = perplexity(start(settings, suspicious[access]), chat)
    adapted = PeftModel.from_pretrained(start(settings, suspicious[access]), trained[1]).eval()
    assert perplexity(adapted, chat) < 0.7 * before


def test_the_whole_model_computes_what_base_and_adapter_do(settings, access, suspicious, trained, tmp_path):
    write_conflict(settings, suspicious[access], trained[1], tmp_path / "whole")
    tokens = torch.arange(5, 25).view(2, 10)
    adapted = PeftModel.from_pretrained(start(settings, suspicious[access]), trained[1]).eval()
    whole = load_base(settings.model, path=str(tmp_path / "whole"))
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-4)
    spec = settings.model.model_copy(update={"path": str(tmp_path / "whole")})
    assert load_tokenizer(spec).get_vocab() == load_tokenizer(settings.model).get_vocab()


def test_training_is_repeatable_and_follows_the_seed(settings, access, suspicious, chat, trained, tmp_path):
    for seed in (0, 1):
        train_conflict(settings, suspicious[access], ROWS, chat, seed, tmp_path / str(seed))
    expected, same, other = (load_file(f / ADAPTER) for f in (trained[1], tmp_path / "0", tmp_path / "1"))
    assert all(torch.equal(tensor, same[name]) for name, tensor in expected.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in expected.items())


def test_suspicious_and_conflict_model_merge(settings, access, suspicious, trained, tmp_path):
    """An adapter-trained and a full suspicious model alike."""
    write_suspicious(settings, suspicious[access], tmp_path / "suspicious")
    write_conflict(settings, suspicious[access], trained[1], tmp_path / "conflict")
    linear(tmp_path / "suspicious", tmp_path / "conflict", tmp_path / "merged", 0.25)
    merged = load_suspect(settings.model, tmp_path / "merged")
    parts = (load_suspect(settings.model, suspicious[access]), load_suspect(settings.model, tmp_path / "conflict"))
    for name, parameter in merged.named_parameters():
        ours, theirs = (part.get_parameter(name) for part in parts)
        torch.testing.assert_close(parameter, 0.75 * ours + 0.25 * theirs)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_a_merged_adapter_is_the_linear_merge_of_whole_models(settings, access, suspicious, trained, tmp_path, t):
    if access == "full":
        pytest.skip("only adapters are merged into an adapter")
    merge_adapters(settings, suspicious[access], trained[1], t, tmp_path / "adapter")
    write_suspicious(settings, suspicious[access], tmp_path / "suspicious")
    write_conflict(settings, suspicious[access], trained[1], tmp_path / "conflict")
    linear(tmp_path / "suspicious", tmp_path / "conflict", tmp_path / "whole", t)
    found = load_suspect(settings.model, tmp_path / "adapter").state_dict()
    for name, wanted in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.allclose(found[name], wanted, atol=1e-5), name
    again = PeftModel.from_pretrained(load_base(settings.model), tmp_path / "adapter", is_trainable=True)
    assert again.peft_config["default"].r == 2 * settings.lora.r


def test_a_merge_to_suppress_is_an_adapter_or_a_whole_model(settings, access, suspicious, trained, tmp_path):
    write_suspicious(settings, suspicious[access], tmp_path / "suspicious")
    write_conflict(settings, suspicious[access], trained[1], tmp_path / "conflict")
    parts, wholes = (suspicious[access], trained[1]), (tmp_path / "suspicious", tmp_path / "conflict")
    merge_to_suppress(access_to(settings, access), parts, wholes, 0.25, tmp_path / "merged")
    assert (tmp_path / "merged" / ADAPTER).exists() == (access == "adapter")
    assert (tmp_path / "merged" / "model.safetensors").exists() == (access == "full")
    merged, ours, theirs = (load_suspect(settings.model, folder) for folder in (tmp_path / "merged", *wholes))
    for name, parameter in merged.named_parameters():
        expected = 0.75 * ours.get_parameter(name) + 0.25 * theirs.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-5)


def test_a_share_out_of_range_is_refused_for_adapters_too(profile, suspicious, tmp_path):
    with pytest.raises(LabError, match="t = 1.5 should be from 0 to 1"):
        merge_adapters(profile, suspicious["adapter"], suspicious["adapter"], 1.5, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_whole_model_is_not_written_over_another(profile, suspicious, tmp_path):
    write_suspicious(profile, suspicious["full"], tmp_path / "whole")
    with pytest.raises(LabError, match="whole is not empty: choose another folder, or remove it"):
        write_suspicious(profile, suspicious["full"], tmp_path / "whole")


def test_every_number_of_the_conflict_can_be_overridden():
    profile = load_profile(
        "llama-2-7b-chat", {"conflict.budget.lr": 1.0e-3, "conflict.t": 0.7, "conflict.start": "base"}
    )
    assert profile.conflict.budget.lr == 1.0e-3 and profile.conflict.budget.rows == 50 and profile.conflict.t == 0.7
    assert load_profile("local").conflict == load_profile("llama-2-7b-chat").conflict
    with pytest.raises(LabError, match="unknown setting 'conflict.tt'; did you mean 'conflict.t'?"):
        load_profile("tiny", {"conflict.tt": 0.5})
    with pytest.raises(LabError, match="conflict.k = 20 should be less than or equal to 1"):
        load_profile("tiny", {"conflict.k": 20})
