"""The list of requirements, the lock made from it and the conda environment agree, so that every laptop gets the same.

The lock may hold nothing that ties it to one machine or one index: no address, no file, no local version such as +cpu.
"""

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.core.paths import ROOT

TORCH = "torch==2.13.0"


def read(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def by_name(requirements):
    """{name: requirements}; one package may stand in the lock twice, for two versions of Python."""
    found = {}
    for requirement in requirements:
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def test_the_lock_holds_every_requirement_in_a_version_that_suits_it():
    locked = by_name(read("requirements-lock.txt"))
    for wanted in read("requirements.txt"):
        pins = locked.get(canonicalize_name(wanted.name), [])
        versions = [specifier.version for pin in pins for specifier in pin.specifier]
        suiting = [version for version in versions if version in wanted.specifier]
        assert pins and suiting == versions, f"{wanted} is locked as {versions}: run `make lock`"


def test_the_lock_pins_one_exact_version_and_nothing_of_one_machine():
    for pin in read("requirements-lock.txt"):
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is no exact version"
        assert pin.url is None and not {"*", "+"} & set(specifier.version), f"{pin} fits one machine or index only"
    text = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    assert not [mark for mark in ("://", "--index", "--find-links", "file:") if mark in text]


def test_torch_is_the_same_in_both():
    for name in ("requirements.txt", "requirements-lock.txt"):
        assert [str(requirement) for requirement in read(name) if requirement.name == "torch"] == [TORCH]


def test_conda_users_get_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements-lock.txt", "-e ."]
    assert any(entry.startswith("python>=3.11") for entry in environment["dependencies"] if isinstance(entry, str))


def test_the_harness_is_one_version_and_none_of_the_labs_own_requirements():
    (harness,) = read("requirements-harness.txt")
    assert [specifier.operator for specifier in harness.specifier] == ["=="]
    assert canonicalize_name(harness.name) not in by_name(read("requirements-lock.txt"))
