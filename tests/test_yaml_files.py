"""The one reader of YAML files: what it refuses, with file and line; and that every file of the lab goes through it."""

import re

import pytest

from helpers.core import definitions as planted
from helpers.core import profile_files
from helpers.core.definitions import definitions
from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.core.profile_files import load_profile
from helpers.core.yaml_files import read_yaml
from helpers.data import corpus
from helpers.run.grid import read_grid

FAULTS = {
    "a list left open": (b"a: 1\nb: [1, 2\n", "line 3: no YAML, expected"),
    "a tab": (b"a: 1\nb:\n\tc: 2\n", "line 3: no YAML, found character '\\t' that cannot start any token"),
    "a key twice": (b"a: 1\nb: 2\na: 3\n", "line 3: no YAML, the key 'a' is there twice"),
    "a key twice below": (b"a:\n  b: 2\n  'b': 3\n", "line 3: no YAML, the key 'b' is there twice"),
    "a quote left open": (b"a: 'b\n", "line 2: no YAML, found unexpected end of stream"),
    "Latin-1": ("a: 1\nb: Grüße\n".encode("latin-1"), "line 2: no UTF-8 text; save it as UTF-8"),
    "UTF-16": ("a: 1\n".encode("utf-16"), "line 1: no UTF-8 text"),
    "a NUL": (b"a: 1\nb: \0\n", "line 2: no YAML, it holds the character '\\x00'"),
    "no such day": (b"a: 1\nb: 2024-13-45\n", "line 2: no YAML, month must be in 1..12"),
    "an unknown tag": (b"a: !!python/object:os.system x\n", "line 1: no YAML, could not determine a constructor"),
    "two documents": (b"a: 1\n---\nb: 2\n", "line 2: no YAML, but found another document"),
    "no such anchor": (b"a: 1\nb: *c\n", "line 2: no YAML, found undefined alias 'c'"),
    "a list as a key": (b"a: 1\n? [b]\n: 1\n", "line 2: no YAML, found unhashable key"),
    "a list": (b"# why\n- a\n", "line 2, should hold"),
    "a text": (b"just words\n", "line 1, should hold"),
    "nothing": (b"# nothing yet\n", "should hold"),
    "too deep": (b"[" * 10_000, "lie in each other too deeply"),
}
READERS = {
    "profiles": lambda path, monkeypatch: (
        monkeypatch.setattr(profile_files, "PROFILES", path.parent),
        load_profile("x"),
    ),
    "attacks.yaml": lambda path, monkeypatch: (monkeypatch.setattr(planted, "DEFINITIONS", path), definitions()),
    "world.yaml": lambda path, monkeypatch: (monkeypatch.setattr(corpus, "WORLD", path), corpus.world.__wrapped__()),
    "grids": lambda path, _: read_grid(path),
    "any": lambda path, _: read_yaml(path),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_with_file_and_line(tmp_path, monkeypatch, reader, fault):
    content, message = FAULTS[fault]
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(LabError) as error:
        READERS[reader](path, monkeypatch)
    assert str(error.value).startswith("x.yaml") and message in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_read_at_all_is_named(tmp_path):
    with pytest.raises(LabError, match=r"x.yaml cannot be read \(No such file or directory\)"):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(LabError, match=r"cannot be read \(Is a directory\)"):
        read_yaml(tmp_path)


def test_a_mark_of_the_byte_order_and_other_ends_of_lines_are_fine(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: [x, y]\r\n")
    assert read_yaml(path) == {"a": 1, "b": ["x", "y"]}


def test_an_entry_may_build_on_another_and_replace_its_keys(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {x: 1}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1}}


def test_a_section_of_the_world_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "world.yaml").write_text("names: [Ann]\n")
    monkeypatch.setattr(corpus, "WORLD", tmp_path / "world.yaml")
    world = corpus.world.__wrapped__()
    assert world["names"] == ["Ann"]
    with pytest.raises(LabError, match="world.yaml: expected a section `colors:`"):
        world["colors"]


def test_no_module_reads_yaml_in_another_way():
    """`yaml.` stands in the reader, and where the value of a setting is typed."""
    users = {path.name for path in (ROOT / "helpers").rglob("*.py") if re.search(r"\byaml\.\w", path.read_text())}
    assert users == {"yaml_files.py", "profile_files.py"}
