"""The slides: they show what the notebooks have stored, open without a network, and speak to those who cannot see."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from course import decks
from course.checking import FOLDER
from course.sources import read_cells, read_tasks
from helpers.core.errors import LabError
from helpers.core.paths import ROOT

DECKS = sorted(decks.SOURCES.glob("*.md"))
INSTRUCTOR = (ROOT / "course" / "INSTRUCTOR.md").read_text(encoding="utf-8")
LOADS = {"src", "href", "srcset", "data", "action", "poster"}  # attributes that fetch something, or lead somewhere
chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

every_deck = pytest.mark.parametrize("source", DECKS, ids=lambda path: path.stem)


class Page(HTMLParser):
    """What a page loads, its pictures and its slides."""

    def __init__(self, html):
        super().__init__()
        self.loaded, self.alts, self.slides, self.captions = [], [], 0, 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loaded += [found[name] for name in LOADS & found.keys()]
        if tag == "img":
            self.alts.append(found.get("alt") or "")
        self.captions += tag == "figcaption"
        self.slides += found.get("class") == "slide"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{name of a deck: its page}."""
    folder = tmp_path_factory.mktemp("slides")
    return {source.stem: decks.build(source, folder) for source in DECKS}


def test_there_is_a_deck_for_each_session():
    sessions = re.findall(r"^\*\*(\d)\. (.+?)\*\* \(notebooks", INSTRUCTOR, re.MULTILINE)
    heads = [source.read_text(encoding="utf-8").splitlines()[:3:2] for source in DECKS]
    assert [f"Session {number} of 3" for number, _ in sessions] == [line.partition(" ·")[0] for _, line in heads]
    assert all(source.stem.startswith(number) for source, (number, _) in zip(DECKS, sessions, strict=True))


@every_deck
def test_a_deck_loads_nothing_but_what_is_inside_it(built, source):
    html = built[source.stem].read_text(encoding="utf-8")
    page = Page(html)
    assert [what[:60] for what in page.loaded if not what.startswith("data:image/")] == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", html)
    assert not re.search(r"https?://", re.sub(r"data:image/[^\"]+", "", html))
    assert page.slides == source.read_text(encoding="utf-8").count("\n---\n") + 1 >= 12


@every_deck
def test_each_picture_says_what_it_shows(built, source):
    page, text = Page(built[source.stem].read_text(encoding="utf-8")), source.read_text(encoding="utf-8")
    figures, formulas = text.count("\n[figure]("), text.count("\n$$")
    assert figures >= 4 and page.captions == figures
    assert len(page.alts) == figures + formulas and all(len(alt.split()) >= 4 for alt in page.alts)


def test_a_figure_is_the_one_stored_in_its_notebook_with_its_words(built):
    notebook = (ROOT / "notebooks" / "05_suppress_channels.ipynb").read_text(encoding="utf-8")
    html = built["2_bdvax"].read_text(encoding="utf-8")
    shown = re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)
    assert any(picture in notebook for picture in shown)
    assert "A cure: a short bar left, a long one right." in html and "as stored in notebook 05" in html


def minutes_of_tasks():
    """{number of a task: its minutes}, as the sources of the sheets declare them."""
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.glob("[0-9][0-9].py")]
    return {task.number: task.minutes for text in texts for task in read_tasks(read_cells(text))}


@every_deck
def test_the_tasks_that_a_deck_sets_are_there_with_their_minutes(source):
    """`sheet 04, task 1` and, in the same slide, its minutes."""
    known, set_tasks = minutes_of_tasks(), 0
    for slide in decks.CUT.split(source.read_text(encoding="utf-8")):
        for sheet, task in re.findall(r"[Ss]heet (\d\d), task (\d)", slide):
            assert f"{sheet}.{task}" in known
            if "Your turn" in slide and (minutes := re.search(r"(\d+) minutes", slide)):
                assert int(minutes[1]) == known[f"{sheet}.{task}"], slide
                set_tasks += 1
    assert set_tasks


def test_a_slide_with_a_missing_picture_is_refused(tmp_path):
    for link, told in (
        ("none.ipynb#05-18", "none.ipynb, which is not there"),
        ("05_suppress_channels.ipynb#05-99", "cell '05-99' of 05_suppress_channels.ipynb shows no picture"),
        ("05_suppress_channels.ipynb#05-01", "cell '05-01' of 05_suppress_channels.ipynb shows no picture"),
    ):
        source = ROOT / "course" / "slides" / "x.md"  # never written: links count from there
        with pytest.raises(LabError, match=re.escape(told)):
            decks.slide_of(f"## A\n\n[figure](../../notebooks/{link})\n", source)


def test_notes_stand_apart_and_a_formula_speaks():
    slide = decks.slide_of("## A\n\n$$x^2$$ (x squared)\n\nNote: say it *twice*.\n", DECKS[0])
    assert slide["note"] == "<p>say it <em>twice</em>.</p>\n" and "say it" not in slide["body"]
    assert 'alt="x squared"' in slide["body"] and "$" not in slide["body"]


@pytest.mark.slow
@pytest.mark.skipif(not chromium, reason="needs Chromium or Chrome")
def test_a_browser_shows_the_slide_that_the_address_names(built):
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    address = f"{built['3_merge_and_judge'].as_uri()}#4"
    dom = subprocess.run([*command, address], capture_output=True, text=True, timeout=60).stdout
    shown = re.findall(r'<section class="slide now".*?<h2>(.*?)</h2>', dom, re.DOTALL)
    assert shown == ["The linear merge"] and re.search(r'id="place">4 / \d+<', dom)
