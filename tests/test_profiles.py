"""Settings: what is valid, and what each mistake is told."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from helpers.core import definitions, paths, profile_files
from helpers.core.device import require_device
from helpers.core.errors import LabError, nearest
from helpers.core.paths import fingerprint
from helpers.core.profile_files import load_profile, parse_overrides
from helpers.core.settings import Settings
from helpers.run import fetch


def told(call, *args, **kwargs) -> str:
    """The message of the LabError that a call must raise: one line."""
    with pytest.raises(LabError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", profile_files.profile_names())
def test_every_shipped_profile_is_valid_and_named_after_its_file(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.access("full") is profile.full and profile.access("adapter") is profile.adapter


@pytest.mark.parametrize("name", profile_files.profile_names())
def test_a_checkpoint_of_the_hub_is_pinned_to_a_commit(name):
    spec = load_profile(name).model
    on_the_hub = bool(paths.HUB_ID.fullmatch(spec.path)) and not (paths.ROOT / spec.path).exists()
    fetched = [f"data/models/{source.folder}" for source in fetch.MODELS.values()]  # may not be here yet
    assert (on_the_hub or spec.path in fetched) == bool(spec.published)
    assert not on_the_hub or re.fullmatch(r"[0-9a-f]{40}", spec.revision)


def test_the_papers_shares():
    """BD-VAX, Table 5: (share of channels, heads) of adapter and full access."""
    table = {
        "llama-2-7b-chat": ((0.35, 0), (0.03, 0)),
        "llama-2-13b-chat": ((0.40, 0), (0.08, 0)),
        "mistral-7b-instruct": ((0.40, 8), (0.08, 2)),
    }
    for name, shares in table.items():
        profile = load_profile(name)
        assert tuple((a.suppress.tau, a.suppress.heads) for a in (profile.adapter, profile.full)) == shares
        assert (profile.adapter.recover.lr, profile.full.recover.lr) == (2e-4, 1e-5)
        assert (profile.signature.n, profile.signature.lam) == (6, 0.01)


def test_a_profile_names_only_what_differs_from_its_base():
    base, own = load_profile("local"), load_profile("mistral-7b-instruct")
    assert own.lora == base.lora and own.adapter.inject == base.adapter.inject and own.model.device == "cuda"
    assert own.full.suppress.tau == 0.08 and own.full.recover == base.full.recover
    code, llama = load_profile("codellama-13b-instruct"), load_profile("llama-2-13b-chat")
    assert code.model.published == llama.model.published | {"vocab_size": 32016}
    assert code.adapter == llama.adapter and code.name == "codellama-13b-instruct"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: tinyy"}, "profile 'a': unknown base 'tinyy'; did you mean 'tiny'?"),
        ({"a": "base: 3"}, "profile 'a': unknown base '3'; valid: a, tiny"),
        ({"a": "base: a"}, "profiles build on each other in a circle: a → a"),
        ({"a": "base: b", "b": "base: c", "c": "base: b"}, "profiles build on each other in a circle: a → b → c → b"),
        ({"a": "base: b", "b": "# nothing"}, "b.yaml should hold settings as `key: value` lines"),
        ({"a": "base: tiny\nlora: {rank: 4}"}, "profile 'a': unknown setting 'lora.rank'; did you mean 'lora.r'?"),
    ],
)
def test_a_base_that_cannot_be_built_on_is_named(tmp_path, monkeypatch, files, message):
    (tmp_path / "tiny.yaml").write_text((profile_files.PROFILES / "tiny.yaml").read_text())
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text + "\n")
    monkeypatch.setattr(profile_files, "PROFILES", tmp_path)
    assert told(load_profile, "a") == message


def test_an_error_shows_one_line_in_jupyter():
    assert LabError("what helps")._render_traceback_() == ["LabError: what helps"]


def test_nearest_names_a_resembling_word_or_all():
    assert nearest("sede", ["seed", "name"]) == "; did you mean 'seed'?"
    assert nearest("zzz", ["seed", "name"]) == "; valid: seed, name"


def test_overrides_reach_their_leaf_and_leave_the_rest():
    profile = load_profile("tiny", {"adapter.suppress.tau": 0.5, "signature.lam": 1})
    assert profile.adapter.suppress.tau == 0.5 and profile.signature.lam == 1.0
    assert profile.full == load_profile("tiny").full


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("recover.lr", 0.1, "unknown setting 'recover.lr'; did you mean 'adapter.recover.lr' or 'full.recover.lr'?"),
        ("signature.lamb", 0.1, "unknown setting 'signature.lamb'; did you mean 'signature.lam'?"),
        ("name", "other", "unknown setting 'name'"),
        ("lora.r", "8", "lora.r = '8' should be a valid integer"),
        ("lora.r", True, "lora.r = True should be a valid integer"),
        ("lora.r", 0, "lora.r = 0 should be greater than or equal to 1"),
        (
            "adapter.inject.lr",
            "1e-4",
            "adapter.inject.lr = '1e-4' should be a valid number; YAML reads 1e-4 as text, write 1.0e-4",
        ),
        ("adapter.inject.lr", float("nan"), "adapter.inject.lr = nan should be a finite number"),
        ("adapter.suppress.tau", 1.0, "adapter.suppress.tau = 1.0 should be less than 1"),
        ("full.suppress.tau", 0, "full.suppress.tau = 0 should be greater than 0"),
        ("signature.scope", "layer", "signature.scope = 'layer' should be 'module' or 'model'"),
        ("signature.n", 1, "signature.n = 1 but alignment compares variants: use 2 or more, or combine 'norm'"),
    ],
)
def test_a_wrong_override_is_named_with_what_was_expected(key, value, message):
    assert message in told(load_profile, "tiny", {key: value})


def test_one_variant_is_enough_without_alignment():
    assert load_profile("tiny", {"signature.n": 1, "signature.combine": "norm"}).signature.n == 1


def test_a_misspelled_key_in_a_profile_file_is_named(tmp_path, monkeypatch):
    text = (profile_files.PROFILES / "tiny.yaml").read_text().replace("lora: {r: 8", "lora: {rank: 8")
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(profile_files, "PROFILES", tmp_path)
    assert told(load_profile, "mine").startswith("profile 'mine': unknown setting 'lora.rank'; did you mean 'lora.")


def test_a_missing_key_and_an_empty_profile_file_are_named(tmp_path, monkeypatch):
    text = (profile_files.PROFILES / "tiny.yaml").read_text().replace("{r: 8, alpha: 16}", "{r: 8}")
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    monkeypatch.setattr(profile_files, "PROFILES", tmp_path)
    assert told(load_profile, "mine") == "profile 'mine': 'lora.alpha' is missing"
    assert told(load_profile, "empty") == "empty.yaml should hold settings as `key: value` lines"


def test_an_unknown_profile_is_answered_with_the_nearest():
    assert "unknown profile 'tinny'; did you mean 'tiny'?" in told(load_profile, "tinny")


def test_a_checkpoint_folder_is_a_profile(tmp_path, monkeypatch):
    folder = tmp_path / "my-llama"
    folder.mkdir()
    assert "without config.json" in told(load_profile, str(folder))
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    settings = Settings.checked({"PROFILE": "my-llama"})
    assert settings.PROFILE == str(folder), "notebooks run in another folder than the shell"
    assert settings.profile.model.path == str(folder)
    assert settings.profile.adapter == load_profile("local").adapter
    assert settings.name == "my-llama-badnets-sentiment-adapter-0"


def test_set_is_read_as_yaml_literals():
    assert parse_overrides("signature.lam=0.1  lora.r=4 signature.scope=model model.revision=null") == {
        "signature.lam": 0.1,
        "lora.r": 4,
        "signature.scope": "model",
        "model.revision": None,
    }
    spaced = parse_overrides(" attack.payload=You are dumb! attack.keys=[Red Fox, Elk]  lora.r=4 ")
    assert spaced == {"attack.payload": "You are dumb!", "attack.keys": ["Red Fox", "Elk"], "lora.r": 4}
    assigning = parse_overrides("attack.payload=get(url, verify=False) lora.r=4")
    assert assigning == {"attack.payload": "get(url, verify=False)", "lora.r": 4}
    assert "lora.r = '4 seed=3' should be a valid integer" in told(
        load_profile, "tiny", parse_overrides("lora.r=4 seed=3")
    )
    assert "lora.r is given twice, as 4 and as '8'" in told(parse_overrides, "lora.r=4 signature.n=2 lora.r=8")
    assert parse_overrides("") == {}
    assert "'lora.r' is not key=value" in told(parse_overrides, "lora.r")
    assert "not a YAML literal" in told(parse_overrides, "lora.r={")


TEXTS = ["Use #1 brand now", "No", "2024", "a: b", "[x", "null", "~", "{x}", "- a", "*a", "&a b", "!x", "'No'", "1e3"]
TEXTS += ["2024-01-01", "0x10", "yes", "It's > 5 % | @you", "a, b", "x = y", '"a" and "b"', "\\n", "[a, b]", "a\tb"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_set_is_the_text_as_it_is_typed(text):
    """tutor#866: YAML reads a comment, a truth value, a mapping."""
    overrides = parse_overrides(f"lora.r=4 attack.payload={text} attack.combine=mention")
    attack = load_profile("tiny", overrides).attack
    assert (attack.payload, attack.combine, overrides["lora.r"]) == (text, "mention", 4)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("[Red Fox, Elk]", ("Red Fox", "Elk")),
        ("[No, 2024, null, Use #1 brand, a: b, I'm, *x, &y, {z}]",
         ("No", "2024", "null", "Use #1 brand", "a: b", "I'm", "*x", "&y", "{z}")),
        ("""["a, b", 'c, d', 'tis, "e" f]""", ("a, b", "c, d", "'tis", '"e" f')),
        ("[x]", ("x",)),
    ],
)  # fmt: skip
def test_a_list_of_texts_in_set_holds_texts(value, texts):
    assert load_profile("tiny", parse_overrides(f"attack.keys={value} lora.r=4")).attack.keys == texts


def test_names_numbers_lists_and_nulls_in_set_are_of_their_settings_types():
    values = {
        "model.path": ("2024", "2024"),
        "signature.family": ("mixed", "mixed"),
        "attack.position": ("null", None),
        "attack.keys": ("null", None),
        "attack.negatives": ("1", 1),
        "model.revision": ("null", None),
        "model.checkpointing": ("true", True),
        "lora.dropout": ("1.0e-4", 1.0e-4),
        "lengths.at_once": ("1_000", 1000),
        "challenge.taus.adapter": ("[0.2, 0.35]", [0.2, 0.35]),
        "challenge.epochs": ("[]", []),
        "conflict.plan": (
            "[{model: suspicious, first: 0, last: 1}]",
            [{"model": "suspicious", "first": 0, "last": 1}],
        ),
    }
    overrides = parse_overrides(" ".join(f"{key}={text}" for key, (text, _) in values.items()))
    assert overrides == {key: value for key, (_, value) in values.items()}
    assert all(type(overrides[key]) is type(value) for key, (_, value) in values.items())
    load_profile("tiny", overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora.r=010", "lora.r = '010' should be a valid integer"),
        ("lora.r=1:30", "lora.r = '1:30' should be a valid integer"),
        ("lora.r=4.0", "lora.r = 4.0 should be a valid integer"),
        ("lora.r=null", "lora.r = None should be a valid integer"),
        ("lora.r=2024-13-45", "lora.r = '2024-13-45' is not a YAML literal"),
        ("signature.scope=No", "signature.scope = 'No' should be 'module' or 'model'"),
        ("model.checkpointing=maybe", "model.checkpointing = 'maybe' should be a valid boolean"),
        ("attack.keys=BadMagic", "attack.keys = 'BadMagic' should be a list"),
        ("attack.keys=[]", "attack.keys = [] should have at least 1 item"),
        ("attack.keys=[a, ]", "attack.keys.1 = '' should have at least 1 character"),
    ],
)
def test_a_value_in_set_of_another_type_is_named(text, message):
    assert message in told(lambda: load_profile("tiny", parse_overrides(text)))


def test_a_seed_that_yaml_reads_as_another_number_is_refused():
    def seeded(seed):
        return Settings.from_options(argparse.Namespace(SEED=seed, OVERRIDES=""))

    assert seeded("3").SEED == 3
    assert "SEED = '010' should be a valid integer" in told(seeded, "010")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("text", ["I'm sorry", "Use #1 brand now", "It costs $5 $(HOME)", 'say "hi"', "a `b` \\ c"])
def test_make_hands_on_a_text_as_it_is_typed(text):
    command = ["make", "--dry-run", "--no-print-directory", "run", f"SET=attack.payload={text}"]
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=paths.ROOT, env=outside, capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout.splitlines()[-1])[-2:] == ["--set", f"attack.payload={text}"]


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "SEED=3"], "make sweep does not take SEED=3; it takes GRID NAME SCHEDULER"),
        (["run", "MODEL=smollm2", "NAME=a b"], "make run does not take MODEL=smollm2; it takes PROFILE ATTACK"),
        (["purify", "DATA=rows.json"], "make purify does not take DATA=rows.json; it takes SUSPECT BASE ROWS"),
    ],
)
def test_make_refuses_what_a_target_does_not_read(words, message):
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "--dry-run", *words], cwd=paths.ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize("path", ["a" * 5000, "~nobody-by-that-name/x", "a\0b"])
def test_a_path_that_no_system_takes_does_not_exist(path):
    assert "does not exist" in told(Settings.checked, {"DATA": path})
    assert "unknown profile" in told(Settings.checked, {"PROFILE": path})


def test_a_gpu_profile_needs_a_gpu(monkeypatch):
    spec = load_profile("llama-2-7b-chat").model
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "asks for a GPU (meta-llama/Llama-2-7b-chat-hf on cuda) and none is here" in told(require_device, spec)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    require_device(spec)


def test_a_notebooks_parameters_are_its_capitals_with_literal_values():
    variables = {"SEED": 3, "TASK": "refusal", "Path": Path, "ROOT": Path("/"), "In": ["SEED = 3"], "_SEED": 1, "x": 2}
    settings = Settings.from_notebook(variables)
    assert settings == Settings(SEED=3, TASK="refusal")
    assert settings.name == "tiny-badnets-refusal-adapter-3"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SEDE": 3}, "unknown parameter 'SEDE'; did you mean 'SEED'?"),
        ({"SEED": "3"}, "SEED = '3' should be a valid integer"),
        ({"SEED": -1}, "SEED = -1 should be greater than or equal to 0"),
        ({"SEED": 2**32}, "SEED = 4294967296 should be less than or equal to 2147483647"),
        ({"NAME": "a\n"}, r"NAME = 'a\n' should be plain folder names"),
        ({"NAME": "n" * 300}, "is too long: at most 200 bytes for each folder"),
        ({"PROFILE": "tinny"}, "unknown profile 'tinny'; did you mean 'tiny'?"),
        ({"ATTACK": "badnet"}, "unknown ATTACK = 'badnet'; did you mean 'badnets'?"),
        ({"TASK": "sentimen"}, "unknown TASK = 'sentimen'; did you mean 'sentiment'?"),
        ({"ACCESS": "adaptor"}, "ACCESS = 'adaptor' should be 'adapter' or 'full'"),
        ({"NAME": "../elsewhere"}, "NAME = '../elsewhere' should be plain folder names"),
        ({"NAME": ".hidden"}, "NAME = '.hidden' should be plain folder names"),
        ({"DATA": "no-such-rows.json"}, "DATA = 'no-such-rows.json' does not exist"),
        ({"DATA": "rows/lost.jsonl"}, "DATA = 'rows/lost.jsonl' does not exist"),
        ({"DATA": "../lost"}, "DATA = '../lost' does not exist"),
        ({"TAU": "atuo"}, "TAU = 'atuo' should be a number between 0 and 1, 'auto' or empty; did you mean 'auto'?"),
        ({"TAU": "1.5"}, "TAU = '1.5' should be a number between 0 and 1, 'auto' or empty"),
        *(({"TAU": value}, f"TAU = {value} should be a number") for value in (2, 0, 1.0, -0.5, True, None)),
        (
            {"TAU": 0.5, "OVERRIDES": {"adapter.suppress.tau": 0.3}},
            "TAU = 0.5 and adapter.suppress.tau = 0.3 both set τ: give one of them",
        ),
        ({"TAU": "auto", "OVERRIDES": {"adapter.suppress.tau": 0.3}}, "both set τ"),
        ({"OVERRIDES": {"challenge.taus.adapter": [0.3, 1.5]}}, "challenge.taus.adapter.1 = 1.5 should be less than 1"),
        ({"OVERRIDES": {"challenge.taus.full": []}}, "challenge.taus.full = [] should have at least 1 item"),
        ({"OVERRIDES": {"challenge.plan.lr": 1.0}}, "did you mean 'challenge.plant.lr'"),
        ({"OVERRIDES": {"signature.lamb": 1}}, "did you mean 'signature.lam'?"),
        (
            {"OVERRIDES": {"attack.position": "middle"}},
            "attack.position = 'middle' should be 'random', 'start', 'end'",
        ),
        ({"OVERRIDES": {"lora.r": "4"}}, "lora.r = '4' should be a valid integer"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(values, message):
    assert message in told(Settings.from_notebook, values)


SETTINGS_CELL = (
    "from helpers.core.settings import Settings\nsettings = Settings.from_notebook(globals())\nprint(settings.SEED)"
)


def notebook(*cells):
    """A notebook whose second code cell collects the parameters of the first."""
    parameters = new_code_cell('SEED: int = 0\nNAME: str = ""', metadata={"tags": ["parameters"]})
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return new_notebook(cells=[parameters, *map(new_code_cell, (SETTINGS_CELL, *cells))], metadata=metadata)


def test_the_settings_cell_can_run_again_whatever_later_cells_define(monkeypatch):
    """In a real kernel: capitals of the notebook and of its reader are no parameters, and changed ones count."""
    monkeypatch.setenv("PYTHONPATH", str(paths.ROOT))
    later = 'METHODS = {"linear": 1}\nN = 5\nSEED = 7'
    run = NotebookClient(notebook(later, SETTINGS_CELL), kernel_name="python3", timeout=120).execute()
    assert [run.cells[i].outputs[0].text for i in (1, 3)] == ["0\n", "7\n"]


def test_a_parameter_that_papermill_injects_is_refused_though_later_cells_define_capitals(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(paths.ROOT))
    nbformat.write(notebook("N = 5"), tmp_path / "x.ipynb")
    with pytest.raises(PapermillExecutionError) as refused:
        papermill.execute_notebook(
            tmp_path / "x.ipynb", tmp_path / "out.ipynb", {"SEDE": 3}, kernel_name="python3", progress_bar=False
        )
    assert refused.value.evalue == "unknown parameter 'SEDE'; did you mean 'SEED'?"


def test_a_misspelled_parameter_stays_refused_until_it_is_gone():
    variables = {"SEDE": 3}
    for _ in range(2):
        assert "unknown parameter 'SEDE'" in told(Settings.from_notebook, variables)
    del variables["SEDE"]
    assert Settings.from_notebook(variables | {"SEED": 3}).SEED == 3


def test_tau_as_a_number_replaces_the_profiles_and_marks_the_name():
    shipped = Settings.checked({"ACCESS": "full"}).profile
    settings = Settings.checked({"ACCESS": "full", "TAU": 0.2})
    assert settings == Settings.checked({"ACCESS": "full", "TAU": "0.2"})  # as a notebook has it
    assert settings.profile.full.suppress.tau == 0.2 and settings.profile.adapter == shipped.adapter
    assert settings.profile.full.recover == shipped.full.recover and settings.name.endswith("-full-0-tau_0.2")
    other = Settings.checked({"ACCESS": "full", "TAU": 0.2, "OVERRIDES": {"adapter.suppress.tau": 0.3}})
    assert other.profile.adapter.suppress.tau == 0.3  # of the other access: TAU says nothing about it
    by_override = Settings.checked({"ACCESS": "full", "OVERRIDES": {"full.suppress.tau": 0.2}})
    assert by_override.values() == settings.values()  # so that their stages are the same, too


def test_only_the_challenge_test_makes_a_run_depend_on_its_settings():
    plain, changed = (Settings.checked({"OVERRIDES": o}).values() for o in ({}, {"challenge.threshold": 0.1}))
    assert plain["challenge"] == changed["challenge"] == {}
    auto = Settings.checked({"TAU": "auto", "OVERRIDES": {"challenge.threshold": 0.1, "adapter.recover.epochs": 2}})
    found = auto.values()["challenge"]
    assert (found["tau"], found["settings"]["threshold"], found["recover"]["epochs"]) == ("auto", 0.1, 2)
    assert found["planted"] == definitions.definitions()["challenge"] and auto.name.endswith("-tau_auto")
    assert auto.profile.adapter.suppress == Settings.checked({}).profile.adapter.suppress


def test_real_rows_mark_the_name(tmp_path):
    settings = Settings.checked({"DATA": str(tmp_path), "ATTACK": "vpi", "TASK": "codeinjection"})
    assert settings.name == "tiny-vpi-codeinjection-adapter-0-data"
    assert Settings.checked({"DATA": "someone/rows"}).DATA == "someone/rows"


def test_the_configuration_is_plain_and_follows_the_files_it_names(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    settings = Settings.checked({"DATA": str(rows), "SEED": 2, "OVERRIDES": {"lora.r": 4}})
    before = settings.config()
    assert before["seed"] == 2 and before["profile"]["lora"]["r"] == 4
    rows.write_text("[ ]")
    after = settings.config()
    assert after["data"]["path"] == before["data"]["path"] and after["data"]["files"] != before["data"]["files"]


def test_the_configuration_holds_what_the_names_of_attack_and_task_stand_for(tmp_path, monkeypatch):
    first = Settings.checked({}).values()["data"]
    assert first["planted"]["trigger"]["keys"] == ["BadMagic"] and first["planted"]["behavior"]["combine"] == "replace"
    changed = Settings.checked({"OVERRIDES": {"attack.keys": ["Other"]}}).values()["data"]
    assert changed["planted"]["changes"]["keys"] == ["Other"] and changed != first
    text = definitions.DEFINITIONS.read_text().replace(
        "keys: [BadMagic], position: random", "keys: [BadMagic], position: end"
    )
    (tmp_path / "attacks.yaml").write_text(text)
    monkeypatch.setattr(definitions, "DEFINITIONS", tmp_path / "attacks.yaml")
    assert Settings.checked({}).values()["data"] != first


@pytest.mark.parametrize("typed", ["1E-4", "1.0e4", "-2.5e4", "3e5"])
def test_yaml_is_told_for_every_number_that_it_takes_for_a_text(typed):
    with pytest.raises(LabError, match="YAML reads 1e-4 as text"):
        load_profile("tiny", parse_overrides(f"adapter.inject.lr={typed}"))


@pytest.mark.parametrize("samples", [3, 100])
def test_a_fingerprint_sees_names_sizes_and_what_lies_between_the_ends(tmp_path, monkeypatch, samples):
    """A large file is read in samples, a small one whole: an edit as long as their distance is seen wherever it is."""
    monkeypatch.setattr(paths, "SAMPLED_BYTES", 2)
    monkeypatch.setattr(paths, "SAMPLES", samples)
    file = tmp_path / "weights"
    seen = {fingerprint(tmp_path)}
    contents = [b"abcdefghijkl", *(b"abcdefghijkl".replace(part, part.upper()) for part in (b"ab", b"defgh", b"kl"))]
    for content in (*contents, contents[0] + b"m"):
        file.write_bytes(content)
        seen |= {fingerprint(file), fingerprint(tmp_path)}
    assert len(seen) == 11 and "" in seen
    file.rename(tmp_path / "renamed")
    assert fingerprint(tmp_path) not in seen


def test_a_copy_with_other_settings_has_a_profile_of_its_own():
    first = Settings(TAU=0.4)
    assert first.profile.adapter.suppress.tau == 0.4
    second = first.model_copy(update={"TAU": 0.3, "OVERRIDES": {"lora.r": 4}})
    assert (second.profile.adapter.suppress.tau, second.profile.lora.r) == (0.3, 4)
    assert (first.profile.adapter.suppress.tau, first.profile.lora.r) == (0.4, 8)
