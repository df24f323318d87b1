"""The course's site: pages are reachable, questions answered; where Sphinx and a browser are, it is looked at."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from helpers.core.paths import ROOT

SITE = ROOT / "site"
BUILT = SITE / "_build" / "html"
LESSONS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CONTRAST = {"runOnly": ["color-contrast"], "resultTypes": ["violations"]}
LOOKED_AT = (  # a page of each kind
    "site/index",
    "site/answers",
    "site/sliders",
    "site/api/access",
    "notebooks/04_score_signature",
    "notebooks/09_compare_defenses",
    "course/sheets/04",
    "course/solutions/04",
    "docs/results",
    "docs/extending",
)


def has(module):
    return importlib.util.find_spec(module) is not None


needs_sphinx = pytest.mark.skipif(not (has("sphinx") and has("myst_nb")), reason="no Sphinx: `make site` installs it")
browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def questions_of(lesson):
    """The questions at the end of a lesson: {number: text}."""
    (text,) = (cell.source for cell in nbformat.read(lesson, as_version=4).cells if "**Questions.**" in cell.source)
    (line,) = re.findall(r"^\*\*Questions\.\*\* (.+)$", text, re.MULTILINE)
    pieces = re.split(r"\((\d)\) ", line)[1:]
    return {int(number): question.strip() for number, question in zip(pieces[::2], pieces[1::2], strict=True)}


def answers_of(lesson):
    """The answers to a lesson: {number: (the question as it is repeated, the answer)}."""
    text = (SITE / "answers.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## \[[^\]]+\]\(\.\./notebooks/{lesson.name}\)\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    found = re.findall(r"^\*\*\((\d)\) ([^\n]+)\*\*\n(.+?)(?=\n\n|\Z)", section.strip(), re.S | re.M)
    return {int(number): (question, answer) for number, question, answer in found}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_question_has_an_answer_of_some_sentences(lesson):
    questions, answers = questions_of(lesson), answers_of(lesson)
    assert list(questions) == list(range(1, len(questions) + 1)) and len(questions) >= 3
    assert {number: question for number, (question, _) in answers.items()} == questions
    for number, (_, answer) in answers.items():
        assert len(re.findall(r"[.?!)](?=\s|$)", answer)) >= 2, f"{lesson.stem} ({number}) has less than two sentences"


def listed_pages(page, seen=()):
    """What the toctrees of a page and of the pages in them list, as paths without an ending."""
    if not page.is_file() or page.suffix != ".md" or page in seen:
        return set()
    found = set()
    for block in TOCTREE.findall(page.read_text(encoding="utf-8")):
        for entry in (line.strip() for line in block.splitlines() if line.strip() and not line.startswith(":")):
            paths = [path for ending in (".md", ".ipynb") for path in page.parent.resolve().glob(f"{entry}{ending}")]
            assert paths or entry.startswith("api/"), f"{page.name} lists {entry}, which is not there"
            for path in (path.resolve() for path in paths):
                found |= {path.with_suffix("")} | listed_pages(path, (*seen, page))
    return found


def test_every_lesson_sheet_solution_and_document_is_in_the_tree_of_pages():
    listed = {path.relative_to(ROOT).as_posix() for path in listed_pages(SITE / "index.md")}
    kinds = ("notebooks/*.ipynb", "course/*.md", "course/sheets/*.ipynb", "course/solutions/*.ipynb", "docs/*.md")
    there = {path.relative_to(ROOT).with_suffix("").as_posix() for kind in kinds for path in ROOT.glob(kind)}
    assert there <= listed, f"in no toctree of site/: {sorted(there - listed)}"


def test_sliders_show_recorded_points_and_nothing_else():
    sys.path.insert(0, str(SITE))
    try:
        import points
    finally:
        sys.path.remove(str(SITE))
    recorded = json.loads((ROOT / "data/results/merges.json").read_text(encoding="utf-8"))["rows"]
    found = {
        (row["conflict.t"], round(100 * row["asr"], 1))
        for row in recorded
        if row["model"] == "conflict" and row.get("conflict.method") == "linear"
    }
    assert {(point["at"], point["asr"]) for point in points.merge_study()["linear"]} == found
    shares = points.share_study()
    assert [point["at"] for point in shares["signature"]] == [point["at"] for point in shares["random channels"]]
    assert len(shares["signature"]) == 12  # four runs with a share of their own and two more each
    (four, six) = points.vaccine_study()["BD-VAX"]
    assert (four["at"], four["seeds"], six["at"], six["seeds"]) == (4, 3, 6, 3)


@pytest.fixture(scope="module")
def built():
    """The site, made as `make site` makes it; what has not changed is not made again."""
    command = ["-q", "--fail-on-warning", "--keep-going", "-c", "site", "-d", "site/_build/doctrees", ".", BUILT]
    made = subprocess.run([sys.executable, "-m", "sphinx", *command], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return BUILT


class Page(HTMLParser):
    """Links, anchors and pictures of one page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.mute = [], set(), 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.mute += tag == "img" and not found.get("alt")


@needs_sphinx
@pytest.mark.slow
def test_links_and_anchors_live_and_pictures_have_alternative_text(built):
    pages = {path: Page(path) for path in built.rglob("*.html") if "_static" not in path.parts}
    assert len(pages) > 60
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                dead.append(f"{path.relative_to(built)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                dead.append(f"{path.relative_to(built)}: {link}")
    assert dead == []
    assert [path.name for path, page in pages.items() if page.mute] == []


@needs_sphinx
@pytest.mark.slow
def test_set_up_hints_and_solutions_are_folded(built):
    lesson = (built / "notebooks/04_score_signature.html").read_text(encoding="utf-8")
    assert lesson.count("Show the set-up") >= 3
    sheet = (built / "course/sheets/04.html").read_text(encoding="utf-8")
    assert sheet.count("<summary>A hint</summary>") == 6
    solutions = (built / "course/solutions/04.html").read_text(encoding="utf-8")
    assert solutions.count("Show the solution") == 3 and solutions.count("Show the discussion") == 3


@pytest.fixture(scope="module")
def browser(built):
    """A headless browser, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: `make site` installs it")
    with playwright.sync_playwright() as driver:
        path = browser_path or driver.chromium.executable_path  # Playwright's own
        if not Path(path).exists():
            pytest.skip("no Chromium or Chrome on this machine: `playwright install chromium` brings one")
        try:
            started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A tab that notes what goes wrong in `page.faults` and reaches no network."""
    tab = browser.new_page()
    tab.faults = []
    tab.on("console", lambda message: message.type == "error" and tab.faults.append(message.text))
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    tab.on("request", lambda asked: asked.url.startswith("http") and tab.faults.append(f"asked for {asked.url}"))
    tab.context.set_offline(True)
    yield tab
    tab.close()


@needs_sphinx
@pytest.mark.slow
def test_every_page_loads_without_an_error_and_without_the_network(built, page):
    for path in sorted(built.rglob("*.html")):
        if "_static" not in path.parts and path != built / "index.html":  # which only leads on
            page.goto(path.as_uri())
            page.wait_for_load_state("load")
            assert page.faults == [], path.relative_to(built)


@needs_sphinx
@pytest.mark.slow
def test_formulas_are_set_and_searching_for_signature_finds_lesson_04(built, page):
    page.goto((built / "notebooks/04_score_signature.html").as_uri())
    page.wait_for_selector("mjx-container")
    page.goto(f"{(built / 'search.html').as_uri()}?q=signature")
    page.wait_for_selector("#search-results a[href*='04_score_signature']")
    assert page.faults == []


@needs_sphinx
@pytest.mark.slow
def test_a_slider_moves_to_the_next_recorded_point(built, page):
    page.goto((built / "site/sliders.html").as_uri())
    merge = page.locator("#recorded-merge")
    before = merge.locator("output").all_inner_texts()
    merge.locator("input").focus()
    page.keyboard.press("ArrowRight")
    assert before[0] == "58.0 %" and merge.locator("output").all_inner_texts()[0] == "31.0 %"


@needs_sphinx
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast_suffices(built, page, mode):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core: `make site` installs it")
    page.add_init_script(f"localStorage.setItem('mode', '{mode}'); localStorage.setItem('theme', '{mode}')")
    faint = []
    for name in LOOKED_AT:
        page.goto((built / f"{name}.html").as_uri())
        assert page.locator("html").get_attribute("data-theme") == mode
        found = axe.Axe().run(page, options=CONTRAST).response["violations"]
        faint += [f"{name}: {node['html'][:200]}" for violation in found for node in violation["nodes"]]
    assert faint == []
