"""What an external LLM replies: the answer, without the thoughts that some models write before it, and what it cost."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import BaseModel, Field

from helpers.core.errors import LabError

FILTERED = "content_filter"  # why an answer ends that a server's filter has cut off
# How models mark thoughts in their text: DeepSeek, Qwen and most others; Mistral; Kimi.
THINK = r"think|thinking|thought|thoughts|reasoning|seed:think"
BEGIN = rf"<(?:{THINK})>|\[THINK\]|◁think▷"
END = rf"</(?:{THINK})>|\[/THINK\]|◁/think▷"


class _Message(BaseModel):
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The text without thoughts; a list holds parts, of which those of the type `text` are said aloud."""
        if isinstance(self.content, list):
            said = (part.get("text") for part in self.content if part.get("type") == "text")
            return without_thoughts("".join(text for text in said if isinstance(text, str)))
        return without_thoughts(self.content or "")


class Choice(BaseModel):
    """One completion: what it says, and why it ends."""

    message: _Message
    finish_reason: Any = None
    error: Any = None


class Failure(BaseModel):
    """What a server says instead of a completion, now and then under a status of success."""

    error: Any = None


class Reply(BaseModel):
    """The part of a chat completion that is used; whatever else a server adds is ignored."""

    choices: list[Choice] = Field(min_length=1)
    usage: Any = None

    def tokens(self, name: str) -> int:
        """A count of tokens; 0 where the server did not count, or counted less than none."""
        count = self.usage.get(name) if isinstance(self.usage, dict) else None
        return max(0, count) if isinstance(count, int) else 0


def without_thoughts(text: str) -> str:
    """What a model says when it has thought: empty where its thoughts were cut off.

    Where the prompt template begins the thoughts, the text holds their end alone.
    """
    options = re.DOTALL | re.IGNORECASE
    aloud = re.sub(f"(?:{BEGIN}).*?(?:{END})", "", text, flags=options)
    aloud = re.split(END, aloud, flags=options)[-1]
    return re.split(BEGIN, aloud, flags=options)[0].strip()


def is_answer(text: str) -> bool:
    """Whether a text says anything: it holds a letter or a digit of any script, and no NUL."""
    return "\0" not in text and any(map(str.isalnum, text))


def asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait (Retry-After), by a number or a date; 0 where it does not.

    Args:
        headers: of a reply; a mapping that takes its names in any case.
    """
    said = headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, float(said))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    return 0.0


@dataclass
class Usage:
    """What an endpoint has cost: requests count every attempt, seconds the waits between attempts, too."""

    prompts: int = 0
    cached: int = 0
    requests: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def line(self) -> str:
        """Requests, rate, tokens, cached share, and the cost where EVIDENCE_PRICE_IN or _OUT is set.

        Raises:
            LabError: a price that is no number from 0 upwards; prices are per million tokens, in any currency.
        """
        share = self.cached / self.prompts if self.prompts else 0.0
        rate = self.requests / self.seconds if self.seconds else 0.0
        return (
            f"{self.prompts} prompts, {share:.0%} from the cache; {self.requests} requests in {self.seconds:.1f} s "
            f"({rate:.1f} per second); {self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out{self._cost()}"
        )

    def _cost(self) -> str:
        price_in, price_out = _price("EVIDENCE_PRICE_IN"), _price("EVIDENCE_PRICE_OUT")
        cost = (price_in * self.prompt_tokens + price_out * self.completion_tokens) / 1e6
        return f"; cost {cost:.4f}" if price_in or price_out else ""


def _price(name: str) -> float:
    text = os.environ.get(name, "") or "0"
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise LabError(f"{name} = {text!r} is no price; expected what a million tokens cost, such as 0.5")
    return price
