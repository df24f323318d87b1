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
SAMPLES, SAMPLED_BYTES = 256, 1 << 16  # of one file; a smaller one is read whole


def fingerprint(path: Path) -> str:
    """Digest of a file or folder ("" when absent): names, sizes and contents; prose (.md) does not count.

    Of a file above 16 MiB, samples at even distances stand for the content: an edited matrix is far longer than one of
    these distances.
    """
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and f.suffix != ".md")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            if size <= SAMPLES * SAMPLED_BYTES:
                digest.update(stream.read())
                continue
            for sample in range(SAMPLES):
                stream.seek(sample * (size - SAMPLED_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLED_BYTES))
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
