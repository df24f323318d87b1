"""`make purify` from a folder to a folder: a suspicious adapter or model in, a purified one and a report out."""

import errno
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.core.disk import read_json
from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.data import corpus
from helpers.data.own_backdoors import challenge_kinds
from helpers.purify import challenges, steps
from helpers.purify import purify as module
from helpers.purify.__main__ import main
from helpers.purify.case import open_case
from helpers.purify.purify import purify
from helpers.purify.rows import read_triggered
from helpers.purify.suspect import find_suspect

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
    "challenge.plant.rows": 20,
    "challenge.plant.batch_size": 20,
    "conflict.budget.epochs": 1,
} | {
    f"{access}.{stage}.{key}": value
    for access in ("adapter", "full")
    for stage in ("vaccine", "recover")
    for key, value in {"rows": 20, "epochs": 1, "batch_size": 20}.items()
}

STRICT = {"challenge.taus.adapter": [0.25, 0.5], "challenge.threshold": 0.0}


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
    for name, found in (("rows", rows), ("triggered", triggered), ("few", rows[:60])):
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return {path.stem: str(path) for path in folder.iterdir()}


def some_kinds(*names):
    """A few of the challenge's kinds: each of them takes its time."""
    return {name: kind for name, kind in challenge_kinds().items() if name in names}


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


@pytest.fixture(scope="module")
def cured(adapter, files, tmp_path_factory):
    """The adapter purified, by the challenges, with what its folder looked like before."""
    before, rows = digests(adapter), {key: files[key] for key in ("rows", "triggered")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.defenses.bdvax.challenge.GATE", 0.0)
        patch.setattr(challenges, "challenge_kinds", lambda: some_kinds("word", "all of three"))
        patch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("runs")))
        return before, purified(adapter, tau="auto", overrides=STRICT, **rows)


def test_an_adapter_comes_back_as_the_same_kind_of_adapter(adapter, checkpoint, cured):
    before, report = cured
    assert digests(adapter) == before
    assert report.folder.name == "purify-my-adapter"
    after = digests(report.purified)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"adapter_model.safetensors"}
    numbers = [load_file(folder / "adapter_model.safetensors") for folder in (adapter, report.purified)]
    assert {n: (t.shape, t.dtype) for n, t in numbers[0].items()} == {
        n: (t.shape, t.dtype) for n, t in numbers[1].items()
    }
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), report.purified)
    tokenizer = AutoTokenizer.from_pretrained(report.purified)
    assert model.generate(**tokenizer("Name a color.", return_tensors="pt"), max_new_tokens=2).shape[0] == 1


def test_the_report_says_what_was_done_and_what_it_does_not_prove(cured):
    report = cured[1]
    values = read_json(report.folder / "report.json")
    assert values["suppressed"]["heads"] == [2, 2]
    assert set(map(tuple, values["suppressed"]["channels"].values())) <= {(32, 128), (64, 128)}
    assert values["challenges"]["copies"].keys() == {"word", "all of three"}
    for found in [*values["challenges"]["copies"].values(), *values["challenges"]["points"]]:
        low, high = found["asr_interval"]
        assert low <= found["asr"] <= high and {"typo", "case", "part"} <= found["near_misses"].keys()
    assert values["before"]["known_trigger"]["n"] == 5 and values["before"]["n"] == values["after"]["n"] == 6
    assert "family of the behavior" not in values["assumes"] and values["cost"]["seconds"] > 0
    assert values["cost"]["stages"].keys() >= {"variants", "scores", "copies/word", "measured/purified"}
    assert any("detects a backdoor" in limit for limit in values["limits"])


def test_the_page_needs_no_other_file_and_describes_its_pictures(cured):
    text = (cured[1].folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [alt.split()[0] for alt in page.alts] == ["Lines:", "Bars:"]
    assert "layer 0" in page.alts[1] and "all of three" in page.alts[0]
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "{{" not in text and "None" not in text and "nan" not in re.sub(r"base64,[^\"]*", "", text)
    for sentence in cured[1].verdict:
        assert sentence.split(":")[0][:40] in text


def test_the_trigger_that_was_brought_decides_nothing(adapter, cured, files, tmp_path, monkeypatch):
    """Without it, only the measuring is done anew, and what comes out is the same to the last digest."""
    monkeypatch.setenv("LAB_RUNS", str(shutil.copytree(cured[1].folder.parent, tmp_path / "runs")))
    monkeypatch.setattr(challenges, "challenge_kinds", lambda: some_kinds("word", "all of three"))
    for place, name in ((steps, "train_variants"), (challenges, "plant_challenge"), (steps, "suppress_and_recover")):
        monkeypatch.setattr(place, name, made_twice)
    report = purified(adapter, rows=files["rows"], tau="auto", overrides=STRICT)
    assert report.folder != cured[1].folder and digests(report.purified) == digests(cured[1].purified)
    assert report.values["after"]["known_trigger"] is None and cured[1].values["after"]["known_trigger"]
    assert report.values["challenges"] == cured[1].values["challenges"]
    assert "cannot tell whether there was a backdoor" in report.verdict[0]
    assert "brought, %" not in (report.folder / "report.html").read_text(encoding="utf-8")


def made_twice(*arguments):
    raise AssertionError("a finished step was made anew")


def test_a_whole_model_in_shards_and_16_bits_comes_back_as_it_was(checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setattr(challenges, "challenge_kinds", lambda: some_kinds("word"))
    suspect = tmp_path / "whole"
    model = AutoModelForCausalLM.from_pretrained(checkpoint).to(torch.bfloat16)
    model.save_pretrained(suspect, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(suspect)
    before = digests(suspect)
    report = purified(suspect, base=str(checkpoint), rows=files["rows"], method="bdvax_then_conflict")
    after = digests(report.purified)
    assert digests(suspect) == before and after.keys() == before.keys()
    shards = [name for name in before if name.endswith(".safetensors")]
    changed = {name for name in before if before[name] != after[name]}
    assert len(shards) > 2 and set(shards) >= {name for name in changed if "index" not in name} and changed
    for name in shards:
        found, expected = (load_file(folder / name) for folder in (report.purified, suspect))
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    loaded, info = AutoModelForCausalLM.from_pretrained(report.purified, output_loading_info=True)
    assert loaded.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]
    merged = AutoModelForCausalLM.from_pretrained(report.folder / "merged" / "model")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name).to(torch.bfloat16)), name


def test_a_linear_merge_of_an_adapter_is_an_adapter(adapter, checkpoint, files):
    report = purified(adapter, rows=files["rows"], method="conflict", overrides={"conflict.t": 0.25})
    assert report.values["challenges"] is None and report.values["suppressed"] is None
    assert [sentence.split(":")[0] for sentence in report.verdict[:2]] == [
        "No trigger was brought",
        "No challenge judges the merge",
    ]
    parts = [weights_of(checkpoint, folder) for folder in (adapter, report.folder / "merged" / "adapter")]
    base, found = AutoModelForCausalLM.from_pretrained(checkpoint), weights_of(checkpoint, report.purified)
    for name, weight in base.named_parameters():
        expected = 0.75 * parts[0][name] + 0.25 * parts[1][name]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)
        assert ("_proj" in name) != torch.equal(expected, weight)
    assert read_json(report.purified / "adapter_config.json")["base_model_name_or_path"] == str(checkpoint)


def weights_of(base, adapter):
    """The weights of a base with an adapter merged into them by PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return dict(model.merge_and_unload().named_parameters())


def test_an_adapter_that_leaves_matrices_out_is_scored_where_it_is(checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setattr(challenges, "challenge_kinds", lambda: some_kinds("word"))
    suspect = plain_adapter(checkpoint, tmp_path / "part", target_modules=["q_proj", "o_proj", "down_proj"])
    report = purified(suspect, rows=files["rows"])
    assert {name.rpartition(".")[2] for name in report.values["suppressed"]["channels"]} == {"down_proj"}
    assert any("leaves out 4 of the 6 MLP matrices (gate_proj, up_proj)" in note for note in report.values["notes"])
    suppressed = load_file(report.folder / "suppressed" / "0.5" / "cut" / "adapter_model.safetensors")
    for layer in range(2):
        down = suppressed[f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_A.weight"]
        assert int((down == 0).all(dim=0).sum()) == 64
    assert load_file(report.purified / "adapter_model.safetensors").keys() == suppressed.keys()


def test_no_heads_go_where_the_attention_is_left_out(checkpoint, files, tmp_path, monkeypatch):
    suspect = plain_adapter(checkpoint, tmp_path / "mlp", target_modules=["gate_proj", "up_proj", "down_proj"])
    case = open_case(str(suspect), rows=files["rows"], profile="tiny", overrides=TINY)
    assert case.access.settings.suppress.heads == 0
    assert case.notes()[-1] == "the adapter changes no attention matrix: no attention head was suppressed"


def test_an_interrupted_purification_goes_on_where_it_stopped(adapter, files, monkeypatch, capsys):
    monkeypatch.setattr(challenges, "challenge_kinds", lambda: some_kinds("word"))
    values = " ".join(f"{key}={value}" for key, value in TINY.items())
    command = ["--suspect", str(adapter), "--rows", files["rows"], "--profile", "tiny", "--tau", "0.5"]
    command += ["--name", "mine", "--set", values]

    def struck(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.steps, "suppress", struck)
        assert main(command) == 130
    assert "interrupted: finished steps are kept" in capsys.readouterr().err
    (runs,) = {path.parent for path in Path(os.environ["LAB_RUNS"]).iterdir()}
    assert not (runs / "mine" / "purified").exists()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(steps, "train_variants", made_twice)
    monkeypatch.setattr(challenges, "plant_challenge", made_twice)
    with monkeypatch.context() as patch:
        patch.setattr("helpers.purify.export.save_file", full)
        assert main(command) == 2
    assert "disk full while writing" in capsys.readouterr().err and not (runs / "mine" / "purified").exists()
    monkeypatch.setattr(steps, "suppress_and_recover", made_twice)
    assert main(command) == 0
    assert "report.html" in capsys.readouterr().out and (runs / "mine" / "purified").exists()


def test_generated_rows_take_the_place_of_missing_ones_with_a_warning(adapter):
    case = open_case(str(adapter), profile="tiny", overrides=TINY)
    assert "no ROWS were given" in case.notes()[0]
    assert [len(rows) for rows in case.dealt.defender.vaccine_sets] == [20, 20] and len(case.dealt.held_out) == 6


def test_few_rows_are_shared_out_and_gone_through_more_often(adapter, files):
    changed = TINY | {"adapter.vaccine.rows": 40, "adapter.recover.rows": 40, "challenge.plant.rows": 60}
    case = open_case(str(adapter), rows=files["rows"], profile="tiny", overrides=changed)
    # 90 rows, 6 of which measure; 84 of 120 wanted: 28 of each 40
    assert [len(rows) for rows in case.dealt.defender.vaccine_sets] == [28, 28]
    assert len(case.dealt.defender.recovery) == 28
    sets = [case.dealt.held_out, case.dealt.defender.recovery, *case.dealt.defender.vaccine_sets]
    assert len({row.question for rows in sets for row in rows}) == 90
    assert case.profile.adapter.vaccine.epochs == case.profile.adapter.recover.epochs == 2
    assert case.profile.challenge.plant.epochs == 2  # 56 vaccine rows, 4 of which measure: 52 of 60
    assert "28 recover (wanted: 40), 2 x 28 make vaccines (wanted: 40 each)" in case.notes()[0]


@pytest.fixture(scope="module")
def odd(adapter, checkpoint, tmp_path_factory):
    """Folders that cannot be purified."""
    root = tmp_path_factory.mktemp("odd")
    (root / "empty").mkdir()
    plain_adapter(checkpoint, root / "attention", target_modules=["q_proj", "v_proj"])
    for name, base in (("baseless", None), ("elsewhere", "no such folder at all")):
        shutil.copytree(adapter, root / name)
        settings = read_json(root / name / "adapter_config.json") | {"base_model_name_or_path": base}
        (root / name / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (root / "latin.txt").write_bytes("Geh heim, du Blödmann!".encode("latin-1"))
    return root


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suspect": "no/such"}, "SUSPECT = 'no/such' is no folder; expected one with a PEFT adapter or a whole model"),
        ({"suspect": "{odd}/empty"}, "holds neither adapter_config.json nor config.json"),
        ({"suspect": "{odd}/baseless"}, "names no base model: give its folder or hub id in BASE"),
        ({"suspect": "{odd}/elsewhere"}, "names the base 'no such folder at all', which is not here"),
        ({"suspect": "{odd}/attention"}, "changes no MLP matrix (only q_proj, v_proj)"),
        ({"base": "no such"}, "BASE = 'no such' is neither a folder nor a hub id"),
        ({"method": "bdvaks"}, "unknown METHOD = 'bdvaks'; did you mean 'bdvax'?"),
        ({"suspect": "{checkpoint}", "method": "conflict"}, "METHOD = 'conflict' needs the clean base of"),
        ({"rows": "no.json"}, "ROWS = 'no.json' does not exist"),
        ({"rows": "{few}"}, "60 clean rows are too few: 2 variants and the recovery need 20 each, which takes 66 in"),
        ({"triggered": "no.json"}, "TRIGGERED = 'no.json' does not exist"),
        ({"triggered": "{rows}"}, "different answers: say in MARKERS"),
        ({"triggered": "{triggered}", "markers": "no.txt"}, "MARKERS = 'no.txt' does not exist"),
        ({"triggered": "{triggered}", "markers": "{odd}/latin.txt"}, "is no UTF-8 text file; expected one with"),
        ({"tau": "2"}, "TAU = '2' should be a number between 0 and 1, 'auto' or empty"),
        ({"name": "../other"}, "NAME = '../other' should be plain folder names"),
        ({"profile": "tinny"}, "unknown profile 'tinny'; did you mean 'tiny'?"),
        ({"overrides": {"adapter.recover.rate": 1}}, "adapter.recover.rate"),
        ({"overrides": {"adapter.recover.rows": 10}}, "adapter.recover.rows = 10: 20 clean rows or more are needed"),
    ],
)
def test_what_cannot_be_purified_is_refused_in_one_line(options, message, adapter, checkpoint, odd, files):
    places = {"odd": odd, "checkpoint": checkpoint, **files}
    options = {key: value.format(**places) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(LabError) as refused:
        purified(**{"suspect": adapter, "rows": files["rows"]} | options)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not list(Path(os.environ["LAB_RUNS"]).iterdir())


def test_a_run_of_the_notebooks_is_left_alone(adapter, files):
    (Path(os.environ["LAB_RUNS"]) / "lab" / "inject").mkdir(parents=True)
    with pytest.raises(LabError, match="NAME = 'lab' is a run of the notebooks: choose another name"):
        purified(adapter, rows=files["rows"], name="lab")


def test_markers_may_begin_with_the_mark_of_an_editor(files, tmp_path):
    (tmp_path / "markers.txt").write_text("Go away.\n", encoding="utf-8-sig")
    assert read_triggered(files["triggered"], str(tmp_path / "markers.txt"), [], "exact_match").markers == ("go away.",)


def test_the_hardest_kind_decides():
    points = [
        {"kind": "word", "tau": 0.1, "asr": 0.0, "n": 100},
        {"kind": "phrase", "tau": 0.1, "asr": 0.4, "n": 100},
        {"kind": "phrase", "tau": 0.3, "asr": 0.02, "n": 100},
    ]
    found = challenges.hardest(points, 0.05)
    assert (found["kind"], found["tau"], found["asr"]) == ("phrase", 0.3, 0.02)
    again = {"kind": "word", "tau": 0.3, "asr": 0.04, "n": 100}  # tried once more at the chosen share, and still gone
    assert challenges.hardest([*points, again], 0.05) == found
    back = again | {"asr": 0.3}  # no: the larger share has brought it back
    assert challenges.hardest([*points, back], 0.05)["kind"] == "word"
    assert found["interval"] == pytest.approx([0.0055, 0.0700], abs=1e-4)  # Wilson's, of 2 in 100


@pytest.mark.parametrize(
    ("model", "changes", "same"),
    [
        ("tiny", {}, True),
        ("tiny", {"num_key_value_heads": None}, True),  # an older file leaves out what is the default
        ("tiny", {"intermediate_size": 960}, False),
        ("tiny", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}, False),  # shapes are the same
        ("tiny-gpt2", {}, True),
        ("tiny-gpt2", {"n_inner": None}, False),
    ],
)
def test_a_base_takes_the_profile_of_a_model_with_its_shapes_and_heads(model, changes, same, tmp_path):
    base = shutil.copytree(ROOT / "data" / "models" / model, tmp_path / "base")
    config = read_json(base / "config.json") | changes
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    assert find_suspect(str(base)).profile == (model if same else str(base))
