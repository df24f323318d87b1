"""Where things lie: the repository, its profiles, the runs; and what a path that a user typed stands for."""

import contextlib
import hashlib
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ROOT / "data" / "profiles"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)(?<!\.jsonl)(?<!\.parquet)(?<!\.tsv)")
MANIFEST = "manifest.json"  # beside the files of every stage
SUMMARY = "summary.json"  # of a run, which `make run` writes last
SAMPLED_BYTES = 1 << 20


def fingerprint(path: Path) -> str:
    """Digest of a file or folder ("" when absent): names, sizes, both ends of each file; prose (.md) does not count."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and f.suffix != ".md")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLED_BYTES))
            stream.seek(max(0, size - SAMPLED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()[:16] if files else ""


def existing(path: str) -> str:
    """The absolute form of a path that exists below the working folder or the repository; else unchanged."""
    return find_existing(path) or path


def find_existing(path: str) -> str:
    """The absolute form of a path that exists below the working folder or the repository; "" where none does."""
    for base in (Path.cwd(), ROOT) if path else ():
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, the home of nobody, a NUL
            if (found := base / Path(path).expanduser()).exists():
                return str(found.resolve())
    return ""


def runs_folder() -> Path:
    """Where all runs live: `runs/` of the repository, or the folder that $LAB_RUNS names."""
    return ROOT / (os.environ.get("LAB_RUNS") or "runs")
