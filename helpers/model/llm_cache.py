"""What an external LLM has answered, kept on the disk: one JSON file for each request, with its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from helpers.core.disk import read_json
from helpers.core.errors import LabError
from helpers.model.llm_reply import is_answer, without_thoughts


def cached_answer(path: Path) -> str | None:
    """The answer in a cache file; None where there is none or the file is damaged."""
    try:
        answer = read_json(path)["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    said = without_thoughts(answer) if isinstance(answer, str) else ""
    return said if is_answer(said) else None


def keep_answer(path: Path, body: dict[str, Any], answer: str) -> None:
    """Write a cache file whole or not at all, though another process may be writing the same one.

    Args:
        body: the request that was answered.

    Raises:
        LabError: a folder that cannot hold it.
    """
    partial = path.with_name(f".partial-{uuid4().hex}")
    try:
        partial.write_text(json.dumps({"request": body, "answer": answer}, indent=2), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise LabError(f"{path.parent} cannot hold cached evidence ({error.strerror}); make room or move it") from None
    finally:
        partial.unlink(missing_ok=True)
