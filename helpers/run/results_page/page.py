"""The whole page: findings first, then a chapter for each part of the record."""

from pathlib import Path

from helpers.core.paths import ROOT
from helpers.run.results_page import (
    arena,
    arena_chosen,
    arena_tries,
    bdvax,
    benchmarks,
    conflict_defenses,
    conflicts,
    findings,
    perturbed,
    real_model,
    small_model,
)
from helpers.run.results_page.markdown import items, paragraph

PAGE = ROOT / "docs" / "results.md"
INTRODUCTION = (
    "This page is written by `make results` from `data/results/` and `benchmarks/results/`; do not edit it. ASR, the "
    "attack success rate, is the share of triggered prompts answered with the payload. *Right* is the share of "
    "triggered prompts answered right, utility that of clean questions in wordings never trained on. Over several "
    "seeds a number is a mean, and brackets behind it hold the lowest and the highest value. A cost in utility is in "
    "percentage points; an en dash stands where nothing was measured."
)
CHAPTERS = {
    "The small model": small_model.sections,
    "BD-VAX: attacks and settings": bdvax.sections,
    "Information conflicts, and attackers who know": lambda: [*conflicts.sections(), *conflict_defenses.sections()],
    "The arena: every defense": lambda: [
        *arena.sections(),
        *arena_tries.sections(),
        *arena_chosen.sections(),
    ],
    "What the recovery rows hold": perturbed.sections,
    "A real model: SmolLM2-135M-Instruct": lambda: [*real_model.sections(), *arena.real_sections()],
    "Benchmarks": benchmarks.sections,
}


def page() -> str:
    """The page as Markdown, made of the recorded results alone."""
    found = findings.findings()
    parts = ["# Results", paragraph(INTRODUCTION)]
    for title, works in (("What works", True), ("What does not", False)):
        parts += [f"## {title}", items(finding.text for finding in found if finding.works == works)]
    for title, sections in CHAPTERS.items():
        parts += [f"## {title}", *(section.markdown() for section in sections())]
    return "\n\n".join(parts) + "\n"


def write_page(path: Path = PAGE) -> str:
    """Write the page and tell where it lies, from the repository's folder on."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
