"""README and `docs/`: links lead somewhere, commands and settings exist, generated parts are current, examples work."""

import copy
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import test_anatomy
import torch
import transformers
import yaml
from bodies import SIZES, Body
from oracles import record_mergekit as oracle
from safetensors.torch import load_file

from helpers.access import access_to
from helpers.attacks.registry import Needs, attack_method
from helpers.core.arena import ARENA
from helpers.core.choices import ATTACK_METHODS, COMBINATIONS, DEFENSES
from helpers.core.definitions import definitions
from helpers.core.disk import read_json
from helpers.core.errors import LabError
from helpers.core.paths import MANIFEST, ROOT
from helpers.core.profile import Profile
from helpers.core.profile_files import load_profile, parse_overrides
from helpers.core.settings import Settings
from helpers.core.stages import STAGES, known_method
from helpers.core.store import Run
from helpers.core.yaml_files import read_yaml
from helpers.data import corpus
from helpers.data.roles import AttackData, DefenderData, RunData, TestData
from helpers.defenses.conflict import merge as merging
from helpers.defenses.registry import find_defense
from helpers.model import architecture
from helpers.run import inject
from helpers.run.arena.rows import Arena
from helpers.run.deal import deal
from helpers.run.docs.parts import DOCS, PARTS, write_parts

README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
MOST_WORDS = 1200  # of the README
WIDTH = 120

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"# (helpers(?:/\w+)*)/(\w+)\.py\n")  # the first line of a block that is a whole file
SHELL = ("bash", "sh", "console")
PLACES = ("<", "…", "path/to/", "rows.json", "my.yaml")  # what stands for something of the reader's own

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@functools.cache
def text_of(page):
    return page.read_text(encoding="utf-8")


def prose(text):
    """A page without its code blocks."""
    return FENCE.sub("", text)


def blocks(text, *languages):
    """The code blocks in some languages, their indentation taken away."""
    return [textwrap.dedent(code) for _, language, code in FENCE.findall(text) if language in languages]


def links(page):
    """What a page links to inside of the repository, as (path, anchor)."""
    targets = LINK.findall(SPAN.sub("", prose(text_of(page))))
    inside = [target for target in targets if not re.match(r"https?:|mailto:", target)]
    return [target.partition("#")[::2] for target in inside]


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", prose(text), re.MULTILINE):
        plain = LINK.sub(lambda link: link[0].split("](")[0], heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        same = sum(bool(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other)) for other in found)
        found.append(f"{slug}-{same}" if same else slug)
    return found


# --- pages and links --------------------------------------------------------------------------------------------------


def test_the_readme_can_be_read_in_one_sitting():
    words = len(text_of(README).split())
    assert words <= MOST_WORDS


@every_page
def test_a_page_has_one_title(page):
    text = text_of(page)
    assert re.findall(r"^# .+", prose(text), re.MULTILINE) == [text.splitlines()[0]]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_lines_fit_a_screen(page):
    """All but those that cannot be broken: rows of tables and addresses."""
    lines = [line for line in prose(text_of(page)).splitlines() if line[:1] != "|" and "https://" not in line]
    assert not [line for line in lines if len(line) > WIDTH]


@every_page
def test_every_link_leads_to_something(page):
    lost = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists():
            lost.append(path)
        elif anchor and anchor not in anchors(text_of(target)):
            lost.append(f"{path}#{anchor}")
    assert not lost, f"{page.name} links to what is not there: {', '.join(lost)}"


def test_every_page_is_reached_from_the_readme():
    reached, wanted = set(), [README]
    while wanted:
        if (page := wanted.pop()) not in reached and page.is_file():
            reached.add(page)
            wanted += [(page.parent / path).resolve() for path, _ in links(page) if path.endswith(".md")]
    assert set(PAGES) <= reached


def test_anchors_are_those_of_github():
    headings = "# A: `b_c`, it's\n## Same\n## Same\n```\n# no heading\n```\n### [Link](x.md) – 1"
    assert anchors(headings) == ["a-b_c-its", "same", "same-1", "link--1"]


# --- commands and settings --------------------------------------------------------------------------------------------


def shell_lines(text):
    """The lines of a page's shell blocks as they are typed, and of other blocks those behind a prompt."""
    lines = [line for code in blocks(text, *SHELL) for line in code.replace("\\\n", " ").splitlines()]
    lines += [line for code in blocks(text, "", "text") for line in code.splitlines() if line.startswith("$ ")]
    return [line.removeprefix("$ ") for line in lines]


def commands(text):
    """The `make` commands of a page, each as the list of its words: of its code blocks, and those within its prose."""
    found = []
    for line in [*shell_lines(text), *(span for span in SPAN.findall(prose(text)) if span.startswith("make "))]:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):  # of the environment
                words = words[1:]
            if words[:1] == ["make"] and words[1:]:
                found.append(words[1:])
    return found


def typed(words):
    """The variables of a `make` command."""
    return dict(word.split("=", 1) for word in words if "=" in word)


def settings_of(words):
    """What the parameters of a `make` command ask for, where none stands for something of the reader's own."""
    values = {name: value for name, value in typed(words).items() if not any(place in value for place in PLACES)}
    overrides = parse_overrides(values.pop("SET", ""))
    known = {name: yaml.safe_load(value) if name == "SEED" else value for name, value in values.items()}
    return Settings.checked({n: v for n, v in known.items() if n in Settings.model_fields} | {"OVERRIDES": overrides})


@pytest.fixture
def define(tmp_path, monkeypatch):
    """A function that adds entries to copies of `data/attacks.yaml` and `data/arena.yaml`."""
    files = {"attacks": copy.deepcopy(definitions()), "arena": copy.deepcopy(read_yaml(ARENA))}
    monkeypatch.setattr("helpers.core.definitions.DEFINITIONS", tmp_path / "attacks.yaml")
    monkeypatch.setattr("helpers.core.arena.ARENA", tmp_path / "arena.yaml")

    def add(section, entries):
        file = "arena" if section in files["arena"] else "attacks"
        files[file][section] |= entries
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(files[file], sort_keys=False), encoding="utf-8")

    add("attacks", {})
    add("rows", {})
    return add


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@every_page
def test_make_knows_every_target_and_variable(page):
    """Asked for a dry run, make refuses whatever it does not know; but it takes a folder for a target."""
    targets = set(re.search(r"^\.PHONY: (.+)", text_of(ROOT / "Makefile"), re.MULTILINE)[1].split())
    for words in commands(text_of(page)):
        assert {word for word in words if "=" not in word} <= targets, f"{page.name}: make {shlex.join(words)}"
        command = ["make", "--dry-run", "--no-print-directory", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MAKEFLAGS": ""})
        assert done.returncode == 0, f"{page.name}: make {shlex.join(words)}: {done.stderr}"


@every_page
def test_every_parameter_of_a_run_is_valid(page, add_file, define):
    """Profiles, attacks, tasks, methods, grids and each dotted setting in SET; what a page adds itself is there."""
    extend(text_of(page), add_file, define)
    for words in commands(text_of(page)):
        given = typed(words)
        if words[0] in ("run", "plan"):
            settings_of(words)
            known_method(given.get("METHOD", "bdvax"))
        if (grid := given.get("GRID", "")) and not any(place in grid for place in PLACES):
            assert (ROOT / grid).is_file(), grid


@every_page
def test_every_setting_within_prose_is_valid(page, add_file, define):
    extend(text_of(page), add_file, define)
    sections = Profile.model_fields
    for span in SPAN.findall(prose(text_of(page))):
        if re.match(r"\w+\.[\w.]+=", span) and span.split(".")[0] in sections and "…" not in span:
            load_profile("tiny", parse_overrides(span))


@every_page
def test_every_module_and_test_that_a_page_names_is_there(page):
    added = {f"{package}/{name}.py" for package, name in FILE.findall(text_of(page))}
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for span in SPAN.findall(prose(text_of(page))):
        if re.fullmatch(r"(helpers|tests)/[\w/.]+", span):
            assert (ROOT / span).exists() or span in added, f"{page.name} names {span}, which is not there"
        if re.fullmatch(r"test_\w+", span):
            assert f"def {span}(" in sources, f"{page.name} names {span}, which is not there"


@every_page
def test_every_module_that_python_is_told_to_run_can_be_run(page):
    for name in re.findall(r"-m (helpers[\w.]*)", text_of(page)):
        found = importlib.util.find_spec(name)
        assert found, f"{page.name} runs {name}, which is not there"
        runs = Path(found.origin).with_name("__main__.py") if found.submodule_search_locations else Path(found.origin)
        assert '__name__ == "__main__"' in runs.read_text(encoding="utf-8"), name


def test_commands_are_found_wherever_they_stand():
    text = 'So `make run SEED=3`.\n```bash\nA=b make plan SET="a.b=1 c.d=2"  # make no\ncd x && make lab\n```\n'
    assert commands(text) == [["plan", "SET=a.b=1 c.d=2"], ["lab"], ["run", "SEED=3"]]


# --- generated parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_generated_part_is_what_the_command_writes_now(part):
    text = text_of(DOCS / part.page)
    assert part.put_into(text) == text, f"docs/{part.page} is stale: run `make docs`"


def test_the_command_writes_its_parts_and_nothing_else(tmp_path):
    for part in PARTS:
        old = text_of(DOCS / part.page)
        (tmp_path / part.page).write_text(old.replace(part.make(), "something old"), encoding="utf-8")
    assert write_parts(tmp_path) == [f"docs/{part.page}" for part in PARTS]
    for part in PARTS:
        assert (tmp_path / part.page).read_bytes() == (DOCS / part.page).read_bytes()


def test_a_page_without_the_place_for_a_part_is_named():
    with pytest.raises(LabError) as caught:
        PARTS[0].put_into("# Architecture\n")
    assert "docs/architecture.md should hold one line '<!-- stages: " in str(caught.value)
    assert "\n" not in str(caught.value)


def drawn():
    """The stage graph as Mermaid has it: {node: (notebook, its stages)}, and its arrows by kind."""
    (graph,) = blocks(text_of(DOCS / "architecture.md"), "mermaid")
    nodes, arrows, box = {}, {"-->": [], "-.->": []}, ""
    for line in map(str.strip, graph.splitlines()):
        if found := re.fullmatch(r'subgraph \w+\["(.+)"\]', line):
            box = found[1].replace(" ", "_")
        elif found := re.fullmatch(r'(\w+)\["(.+)"\]', line):
            nodes[found[1]] = (box, found[2].split("<br>"))
        elif found := re.fullmatch(r"(\w+) (-->|-\.->) (\w+)", line):
            arrows[found[2]].append((found[1], found[3]))
    return nodes, arrows


def upstream(node, arrows):
    """All nodes from which arrows lead to one, directly or not."""
    before = {first for first, second in arrows if second == node}
    return before.union(*(upstream(one, arrows) for one in before))


def origins(name, tested):
    """All stages that one is made from, and with the challenge test, directly or not."""
    entry = STAGES[name]
    before = {*entry.parents, *(entry.tested if tested else ())}
    return before.union(*(origins(one, tested) for one in before))


def test_the_graph_holds_every_stage_but_reports_in_its_notebook():
    nodes, _ = drawn()
    shown = [(name, notebook) for notebook, names in nodes.values() for name in names]
    reports = {name for name, entry in STAGES.items() if name.startswith("evaluate/") and entry.parents}
    assert sorted(shown) == sorted((name, STAGES[name].notebook) for name in STAGES.keys() - reports)


def test_arrows_lead_to_a_stage_from_all_that_it_is_made_from():
    nodes, arrows = drawn()
    for node, (_, names) in nodes.items():
        for tested, kinds in ((False, arrows["-->"]), (True, arrows["-->"] + arrows["-.->"])):
            above = {name for one in upstream(node, kinds) for name in nodes[one][1]}
            assert all(above == origins(name, tested) for name in names), node


def test_no_arrow_follows_from_others():
    arrows = [arrow for kind in drawn()[1].values() for arrow in kind]
    for first, second in drawn()[1]["-->"]:
        others = [arrow for arrow in drawn()[1]["-->"] if arrow != (first, second)]
        assert first not in upstream(second, others)
    assert len(arrows) == len(set(arrows))


def test_the_table_of_assumptions_is_the_registrys():
    (part,) = (part for part in PARTS if part.name == "assumptions")
    heading, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in part.make().splitlines())
    assert {line[0].strip("`") for line in lines} == DEFENSES.modules().keys()
    for line in lines:
        needed = {what for what, cell in zip(heading, line, strict=True) if cell == "needed"}
        traits = find_defense(line[0].strip("`")).traits
        assert needed == set(traits.assumes) and line[-1] == (", ".join(dict.fromkeys(traits.trains)) or "–")


# how many tables and figures each paper numbers
PAPERS = {"BD-VAX": (11, 2), "Information conflicts": (9, 4)}


def lines_of_the_papers():
    """{paper: the cells of each line} of the page that lists the papers' tables and figures."""
    parts = re.split(r"^## (.+)$", text_of(DOCS / "papers.md"), flags=re.MULTILINE)[1:]
    chapters = dict(zip(parts[::2], parts[1::2], strict=True))
    rows = {paper: re.findall(r"^\|(.+)\|$", chapter, re.MULTILINE)[2:] for paper, chapter in chapters.items()}
    return {paper: [[cell.strip() for cell in row.split("|")] for row in found] for paper, found in rows.items()}


def test_every_table_and_figure_of_the_papers_has_its_line():
    found = lines_of_the_papers()
    assert found.keys() == PAPERS.keys()
    for paper, (tables, figures) in PAPERS.items():
        numbered = [f"Figure {i + 1}" for i in range(figures)] + [f"Table {i + 1}" for i in range(tables)]
        assert [line[0] for line in found[paper]] == numbered


def test_grids_and_records_of_the_papers_are_there_and_none_is_left_out():
    """A grid that serves a table of a paper is named with its record, and without one where there is none."""
    named = set()
    for line in (line for found in lines_of_the_papers().values() for line in found):
        grids, records = SPAN.findall(line[3]), SPAN.findall(line[4])
        named |= {*grids}
        for grid in grids:
            assert (ROOT / "notebooks" / "parameters" / "grids" / f"{grid}.yaml").is_file()
            made = (ROOT / "data" / "results" / f"{grid}.json").is_file()
            assert made == (f"{grid}.json" in records), grid
        assert all((ROOT / "data" / "results" / record).is_file() for record in records)
    own = {
        "tau",
        "implants",
        "implants_dev",
        "implants_3000",
        "attacks_3000",
        "full_tries",
        "perturbed",
        "perturbed_attacks",
        "perturbed_dev",
        "arena_tries",
        "arena_chosen",
    }
    own |= {"challenge", "challenge_code", "challenge_healing", "perturbed_adaptive"}  # what neither paper has
    assert named | own == {path.stem for path in (ROOT / "notebooks" / "parameters" / "grids").glob("*.yaml")}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("attacks.md", [*definitions()["attacks"], *definitions()["behaviors"]]),
        ("attacks.md", [*ATTACK_METHODS.modules(), *COMBINATIONS.modules()]),
        ("defenses.md", [*DEFENSES.modules(), *merging.METHODS]),
    ],
)
def test_nothing_that_can_be_chosen_is_left_out(page, names):
    shown = {name for span in SPAN.findall(text_of(DOCS / page)) for name in re.split(r", ", span)}
    assert set(names) <= shown


# --- what the page on extending tells to do ---------------------------------------------------------------------------

EXTENDING = DOCS / "extending.md"
SMALL = "adapter.inject.rows=7 adapter.inject.epochs=1 adapter.inject.batch_size=4 lengths.new_tokens=8 "
SMALL += "model.device=cpu model.dtype=float32"


def section(title):
    """The text below a heading."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text_of(EXTENDING), re.DOTALL | re.MULTILINE)
    return found


def lines_for(text, place, names):
    """The entries of a table that a section adds to a place, as its first line calls it.

    Args:
        names: what stands for itself where the table is.
    """
    (code,) = (code for code in blocks(text, "python") if code.startswith(f"# {place}\n"))
    return eval(f"{{{code}}}", dict(names))


def extend(text, add_file, define):
    """Do what a text tells to do: put its files where they belong, and its entries into the definitions in `data/`."""
    for code in blocks(text, "python"):
        if found := FILE.match(code):
            add_file(found[1].replace("/", "."), found[2], code)
    for code in blocks(text, "yaml"):
        if found := re.match(r"# data/(?:attacks|arena)\.yaml, in (\w+)\n", code):
            define(found[1], yaml.safe_load(code))


@pytest.fixture
def follow(add_file, define):
    """A function that extends the lab by a section of the page; returns the section and its last `make` command."""

    def do(title):
        extend(section(title), add_file, define)
        return section(title), [words for words in commands(section(title)) if words[0] == "run"][-1]

    return do


def with_set(words, more):
    """The words of a command with more in their SET."""
    given = typed(words)
    return [f"{name}={value}" for name, value in (given | {"SET": f"{given.get('SET', '')} {more}".strip()}).items()]


@pytest.mark.parametrize("title", re.findall(r"^## (.+)", EXTENDING.read_text(encoding="utf-8"), re.MULTILINE))
def test_each_takes_five_steps(title):
    assert re.findall(r"^(\d)\. ", prose(section(title)), re.MULTILINE) == list("12345")


@pytest.mark.slow
def test_the_attack_method_of_the_page_plants(follow, checkpoint, tmp_path, monkeypatch):
    """By its command and as an attack of its own: of seven poisoned rows beside seven clean ones it takes four."""
    text, command = follow("An attack method")
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    for name, words in (("by", command), ("named", ["ATTACK=rare"])):
        chosen = {"ATTACK": "badnets"} | typed(with_set(words, SMALL))
        asked = ["--name", name, "--attack", chosen["ATTACK"], "--set", chosen["SET"]]
        assert inject.main(["--profile", str(checkpoint), *asked]) == 0
        assert read_json(tmp_path / "runs" / name / "inject" / MANIFEST)["result"]["rows"] == 7 + 4
    ((name, needs),) = lines_for(text, "tests/test_attack_methods.py, in NEEDS", {}).items()
    assert attack_method(name).needs == Needs(**needs)


def test_the_combination_of_the_page_is_planted(follow):
    _, command = follow("A behavior with a combination of its own")
    attack = deal(settings_of(with_set(command, "adapter.inject.rows=8"))).attack
    pairs = list(zip(attack.poisoned, attack.clean, strict=False))
    assert pairs and all(bad.output == f"{clean.output}\nVisit BrightTower!" for bad, clean in pairs)


@pytest.mark.slow
def test_the_defense_of_the_page_purifies_in_the_arena(follow, checkpoint, suspicious, chat, tmp_path):
    """By its command: 24 rows in batches of four, twice; the registry knows its stages, and what outdates them."""
    _, command = follow("A defense")
    rows = corpus.generate_distinct(30, 7)
    defender = DefenderData([rows[:8], rows[8:16]], rows[16:24], "exact_match")
    data = RunData(AttackData([], []), defender, TestData(rows[24:], rows[24:], ("stupid",), "exact_match"))

    def run_the_row(batch_size):
        numbers = {"model.path": str(checkpoint), "lengths.new_tokens": 8, "evaluation.batch_size": batch_size}
        numbers |= {"adapter.recover.epochs": 2, "adapter.recover.batch_size": 4}
        settings = settings_of(command).model_copy(update={"OVERRIDES": numbers})
        run = Run(tmp_path / "run", settings.config())
        run.stage("inject", lambda folder: shutil.copytree(suspicious["adapter"], folder, dirs_exist_ok=True) and None)
        Arena(run, access_to(settings.profile, "adapter"), data, chat, settings).run_all()
        return run.need("arena/all_rows"), run.need("evaluate/arena/all_rows")

    purified, report = run_the_row(4)
    record = purified.result["record"]
    assert (record["rows"], record["steps"]) == (24, 12) and 0 <= report.result["asr"] <= 1
    again, other = run_the_row(8)  # how it is measured changes the report alone
    assert again.manifest == purified.manifest and other.digest != report.digest


@pytest.fixture
def methods():
    """The merge methods; what a test has added is gone again."""
    before = dict(merging.METHODS)
    yield merging.METHODS
    merging.METHODS.clear()
    merging.METHODS.update(before)


def test_the_merge_method_of_the_page_merges(follow, methods, tmp_path):
    """Number by number the one that is nearer to the base."""
    _, command = follow("A merge method")
    merging.load_methods(merging.__path__, merging.__name__)
    models, conflict = oracle.write_models(tmp_path / "models", "float32"), settings_of(command).profile.conflict
    merging.merge(conflict, *(models[name] for name in ("suspicious", "conflict", "base")), tmp_path / "merged")
    ours, theirs, base, found = (
        load_file(next(folder.glob("*.safetensors")))
        for folder in (*(models[name] for name in ("suspicious", "conflict", "base")), tmp_path / "merged")
    )
    for name, merged in found.items():
        numbers = zip(*(each[name].flatten().tolist() for each in (ours, theirs, base)), strict=True)
        assert merged.flatten().tolist() == [a if abs(a - o) <= abs(b - o) else b for a, b, o in numbers]
        assert not torch.equal(merged, ours[name]) and not torch.equal(merged, theirs[name])


@pytest.fixture
def described(monkeypatch):
    """The bodies that the page describes, once the architectures that it adds are in the table."""
    text, known = section("An architecture"), dict(vars(architecture))
    configs = {name: getattr(transformers, name) for name in re.findall(r"\b\w+Config\b", text)}
    bodies = lines_for(text, "tests/bodies.py, in BODIES", configs | {"SIZES": SIZES, "Body": Body})
    for body in bodies.values():
        with pytest.raises(LabError) as caught:
            architecture.matrices(body.config)
        found = str(caught.value).partition("found ")[2].split(", ")
        assert {f"{body.layers}.*.{part}" for part in (*body.mlp_in, body.mlp_out, *body.attention)} <= set(found)
    (code,) = (code for code in blocks(text, "python") if code.startswith("# helpers/model/architecture.py, beside "))
    exec(code, known)
    for name, entry in lines_for(text, "helpers/model/architecture.py, in ARCHITECTURES", known).items():
        monkeypatch.setitem(architecture.ARCHITECTURES, name, entry)
    return bodies


def test_the_architectures_of_the_page_have_channels_and_heads(described):
    """The tests of every architecture pass; before, the refusal names each matrix that the page describes."""
    assert {name: body.config.model_type for name, body in described.items()} == {name: name for name in described}
    for body in described.values():
        test_anatomy.test_a_channel_is_its_slices(body, body.model())
        test_anatomy.test_each_slice_alone_silences_its_channel(body, body.model())
        for chosen in ([1], [2, 3]):
            test_anatomy.test_heads_vanish_and_take_no_other_head_with_them(body, body.model(), chosen)
            test_anatomy.test_shared_keys_and_values_go_only_with_the_whole_group(body, chosen)
        test_anatomy.test_head_slots_name_the_value_rows_each_head_reads(body, body.model())
        test_anatomy.test_slots_cover_the_matrices_of_the_model(body, body.model())
        test_anatomy.test_matrices_are_whole_and_each_once(body)
