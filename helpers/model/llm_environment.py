"""Which external LLM the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from helpers.core.errors import LabError
from helpers.model.llm_client import Endpoint


def endpoint_of_environment(
    cache: Path, max_tokens: int = Endpoint.max_tokens, temperature: float = Endpoint.temperature
) -> Endpoint | None:
    """The endpoint that EVIDENCE_URL and EVIDENCE_MODEL name; None where neither is set.

    Args:
        cache: folder for its answers, made on demand.
        max_tokens: the longest answer, thoughts included, unless EVIDENCE_TOKENS says how long it may be.
        temperature: of its answers.

    Raises:
        LabError: one of the two is missing, EVIDENCE_TOKENS is no number of tokens, or as `Endpoint`.
    """
    url, model = (os.environ.get(name, "").strip() for name in ("EVIDENCE_URL", "EVIDENCE_MODEL"))
    if bool(url) != bool(model):
        missing, present = ("EVIDENCE_MODEL", "EVIDENCE_URL") if url else ("EVIDENCE_URL", "EVIDENCE_MODEL")
        raise LabError(f"{present} is set and {missing} is not: set both for an endpoint, none to do without")
    return Endpoint(url, model, cache, temperature, _tokens(max_tokens)) if url else None


def _tokens(otherwise: int) -> int:
    text = os.environ.get("EVIDENCE_TOKENS", "").strip() or str(otherwise)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise LabError(f"EVIDENCE_TOKENS = {text!r} is no number of tokens; expected one such as {otherwise}")
    return int(text)
