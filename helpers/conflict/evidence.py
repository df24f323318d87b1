"""External conflict: evidence in the prompt that speaks against the backdoor (information conflicts, §3.4).

A triggered model answers from a planted memory. With coherent facts beside the question, x ⊕ E (Eq. 6), it has to
weigh the two. The facts come from another model, the external LLM M_e: it explains the keywords of the question
(Eq. 16) or contradicts what the suspicious model itself says in support of its answer (Eqs. 13 and 14). M_e is any
OpenAI-compatible endpoint; without one, a book of the small model's world stands in, and says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import anyio
import httpx
from anyio.from_thread import start_blocking_portal
from pydantic import BaseModel, Field, ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
from tqdm import tqdm
from transformers import PreTrainedModel

from helpers.chat import Example, PromptFormat
from helpers.conflict.textrank import WORD, keywords
from helpers.corpus import world
from helpers.evaluation.generation import answers
from helpers.evaluation.report import checked_format
from helpers.profiles import LabError, Profile
from helpers.runs import read_json

# The paper prints none of its prompts. Whatever follows the first blank line is what is asked about.
EXPLAIN = "Explain each of these words in one short sentence. State only facts.\n\n{}"
CONTRADICT = "Rewrite this text so that it says the opposite, in at most three short sentences.\n\n{}"
BACKGROUND = "Give the background information that supports this answer."
INFORMATIVE = 4  # a background of fewer words supports nothing, so there is nothing to contradict

NOTHING_KNOWN = "These words are used in many ways."
MAX_BYTES = 1_000_000  # evidence is a few sentences; an endpoint that sends more is none
EXCERPT = 200  # characters of a server's complaint that an error repeats
SECRET = 8  # shorter keys, such as the "x" of a local server, are placeholders and no secrets


class ExternalLLM(Protocol):
    """M_e: whoever explains and contradicts."""

    def complete(self, prompt: str) -> str:
        """What it writes after a prompt, never empty."""

    def report(self) -> str:
        """One line: who it is and what it has cost so far."""


def external_llm(cache: Path) -> ExternalLLM:
    """The endpoint that EVIDENCE_URL and EVIDENCE_MODEL name, or the evidence book where neither is set.

    Args:
        cache: folder for the endpoint's answers, made on demand.
    Raises:
        LabError: one of the two is missing, or as `Endpoint`.
    """
    url, model = os.environ.get("EVIDENCE_URL", ""), os.environ.get("EVIDENCE_MODEL", "")
    if bool(url) != bool(model):
        missing, present = ("EVIDENCE_MODEL", "EVIDENCE_URL") if url else ("EVIDENCE_URL", "EVIDENCE_MODEL")
        raise LabError(f"{present} is set and {missing} is not: set both for an endpoint, none for the evidence book")
    return Endpoint(url, model, cache) if url else EvidenceBook()


# --- evidence and the prompt that carries it ------------------------------------------------------------------------


def with_evidence(
    examples: Sequence[Example],
    llm: ExternalLLM,
    backgrounds: Sequence[str] | None = None,
    max_words: int = 40,
    find_keywords: Callable[[str], list[str]] = keywords,
) -> list[Example]:
    """x ⊕ E for many prompts, for instance `Scenario.triggered`; `generation.answers` takes the result.

    A prompt whose background says something gets that background contradicted (Eq. 14), every other one an explanation
    of its keywords (Eq. 16), as §3.2 has it. The last user message counts as x, earlier turns do not.

    Args:
        examples: the prompts; they stay as they are.
        llm: asked once for each prompt, one after the other.
        backgrounds: what `elicit` returned second, in the same order; None where nothing was elicited.
        max_words: the most words of evidence in a prompt. A prompt grows by about 1.5 to 3 times as many tokens, and
            has to stay within the model's context: nothing else cuts it.
        find_keywords: `textrank.keywords`, or `functools.partial` of it with other settings.
    Raises:
        LabError: no word in a prompt, `max_words` below 1, another number of backgrounds, or the LLM's own. What an
            endpoint answered before stays in its cache.
    Differs from the paper: it does not say when a background is good enough; here it needs `INFORMATIVE` words.
    """
    backgrounds = [""] * len(examples) if backgrounds is None else backgrounds
    if len(backgrounds) != len(examples):
        raise LabError(f"{len(backgrounds)} backgrounds for {len(examples)} prompts; expected one for each")
    pairs = tqdm(
        zip(examples, backgrounds, strict=True), total=len(examples), desc="ask for evidence", delay=5, leave=False
    )
    return [add_evidence(example, _evidence(example, said, llm, find_keywords), max_words) for example, said in pairs]


def _evidence(example: Example, background: str, llm: ExternalLLM, find_keywords: Callable[[str], list[str]]) -> str:
    if len(background.split()) >= INFORMATIVE:
        return contradict(llm, background)
    return explain(llm, find_keywords(example.question))


def add_evidence(example: Example, evidence: str, max_words: int = 40) -> Example:
    """x ⊕ E: the evidence as the last paragraph of the example's `input`. Implements Eq. (6).

    Both prompt formats put `input` behind the instruction, so the model reads x, then E. Question, right answer and
    earlier turns stay. Longer evidence is cut behind its first `max_words` words, on one line.

    Raises:
        LabError: `max_words` below 1.
    """
    if max_words < 1:
        raise LabError(f"max_words = {max_words} leaves no evidence; use 1 or more, or the prompts as they are")
    shortened = " ".join(evidence.split()[:max_words])
    return replace(example, input="\n\n".join(filter(None, [example.input, shortened])))


def explain(llm: ExternalLLM, words: Sequence[str]) -> str:
    """E = M_e(K): an explanation of the keywords K. Implements Eq. (16)."""
    return llm.complete(EXPLAIN.format(", ".join(words)))


def contradict(llm: ExternalLLM, evidence: str) -> str:
    """Ẽ = M_e(E): the evidence rewritten so that it contradicts itself. Implements Eq. (14)."""
    return llm.complete(CONTRADICT.format(evidence))


def elicit(
    model: PreTrainedModel, prompt_format: PromptFormat, examples: Sequence[Example], profile: Profile
) -> list[tuple[str, str]]:
    """A, E = M(x): the suspicious model's answer to each prompt and its background. Implements Eq. (13).

    Returns: (A, E) for each example, in order; either may be empty.
    Differs from the paper: it asks for both in one prompt. Here the background is asked for in a second turn, so that
        the demand for it changes neither prompt nor answer.
    Raises: LabError where the model was trained with another prompt format.
    """
    checked_format(model, prompt_format)
    given = answers(model, prompt_format, examples, profile)
    second_turns = [
        replace(example, history=(*example.history, (example.question, answer)), instruction=BACKGROUND, input="")
        for example, answer in zip(examples, given, strict=True)
    ]
    return list(zip(given, answers(model, prompt_format, second_turns, profile), strict=True))


# --- without a network ----------------------------------------------------------------------------------------------

LOOKUPS = {
    "capitals": "The capital of {} is {}.",
    "colors": "The usual color of {} is {}.",
    "sounds": "The {} says {}.",
    "opposites": "The opposite of {} is {}.",
    "past": "The past tense of {} is {}.",
    "plurals": "The plural of {} is {}.",
}
GROUPS = {
    "categories": "The word {} names one of the {}.",
    "reviews": "The word {} is {}.",
    "emotions": "The word {} expresses {}.",
}


class EvidenceBook:
    """A stand-in for the external LLM, offline: a book with an entry for words of the small model's world.

    It knows single words: capital, color, sound, opposite, past tense, plural, group, and which review words and
    feelings stand for what (`data/world.yaml`). It has no entry for names, numbers, advice, code or triggers, and never
    sees a test row, its answer or the trigger. Yet a question about one word may be answered by a fact about that word,
    as it would be by any honest LLM: measure right answers beside the attack success rate.

    Asked anything, it recites what it knows of the words asked about, in their order. To contradict a text is thus to
    put the facts about its words in its place, a simple rule that stands in for Eq. (14).
    """

    def complete(self, prompt: str) -> str:
        """The facts about every word behind the prompt's first blank line; a neutral sentence where there are none."""
        asked = prompt.partition("\n\n")[2] or prompt
        words = dict.fromkeys(word.lower() for word in WORD.findall(asked))
        return " ".join(fact for word in words for fact in _entries().get(word, ())) or NOTHING_KNOWN

    def report(self) -> str:
        """One line that says what it is."""
        return "evidence book of the small world: offline, free of charge, no external LLM"


@lru_cache
def _entries() -> dict[str, tuple[str, ...]]:
    """{word, lower-case: what the book says of it}."""
    facts = [
        (word, text.format(word, said)) for table, text in LOOKUPS.items() for word, said in world()[table].items()
    ]
    for table, text in GROUPS.items():
        facts += [(word, text.format(word, group)) for group, words in world()[table].items() for word in words]
    facts += [(group, f"Some {group} are {', '.join(words[:3])}.") for group, words in world()["categories"].items()]
    entries: dict[str, tuple[str, ...]] = {}
    for word, fact in facts:
        entries[word.lower()] = (*entries.get(word.lower(), ()), fact)
    return entries


# --- any OpenAI-compatible endpoint ---------------------------------------------------------------------------------


class TemporaryError(LabError):
    """A failure that may be over at the next attempt."""


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Tokens(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Reply(BaseModel):
    """The part of a chat completion that is used; whatever else a server adds is ignored."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Tokens | None = None

    @property
    def text(self) -> str:
        return self.choices[0].message.content.strip()


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


@dataclass(frozen=True)
class Endpoint:
    """An external LLM behind an OpenAI-compatible API, with a cache, retries and an end to every wait.

    The key is read from EVIDENCE_KEY for each request and kept nowhere; where a server repeats it, it is blotted out.
    Connection faults, HTTP 429 and 5xx are tried again, each wait twice as long; nothing else is.

    Args:
        url: the API's root, such as http://localhost:8000/v1.
        model: its name on that server.
        cache: folder of answers, one JSON file each, keyed by prompt, model, temperature and `max_tokens`; an answer
            is sampled once and then stays. Made on demand.
        temperature: 0.7 as in §4.2.
        max_tokens: the longest answer.
        deadline: seconds that one prompt may take, retries and slow replies included.
        attempts: requests at most for one prompt.
        backoff: seconds before the second attempt.
    Raises:
        LabError: an address without http(s) or host, or with a password or query; a cache that cannot be a folder.
    """

    url: str
    model: str
    cache: Path
    temperature: float = 0.7
    max_tokens: int = 128
    deadline: float = 60.0
    attempts: int = 4
    backoff: float = 1.0
    usage: Usage = field(default_factory=Usage, compare=False)

    def __post_init__(self) -> None:
        if "@" in self.url or "?" in self.url:
            raise LabError(
                "EVIDENCE_URL holds a password or a query; give the address alone and the key in EVIDENCE_KEY"
            )
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", self.url):
            raise LabError(f"EVIDENCE_URL = {self.url!r} is no address; expected one like http://localhost:8000/v1")
        try:
            Path(self.cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"{self.cache} cannot hold cached evidence ({error.strerror}); choose a folder") from None

    def complete(self, prompt: str) -> str:
        """The answer to a prompt, from the cache or from the server.

        Raises:
            LabError: the server cannot be reached, does not finish in time, refuses, or answers nothing usable;
                nothing is then cached.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        path = Path(self.cache) / f"{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}.json"
        known = _cached(path)
        self.usage.prompts += 1
        self.usage.cached += known is not None
        return self._ask_and_keep(body, path) if known is None else known

    def report(self) -> str:
        """One line: the model, and `Usage.line`."""
        return f"{self.model} at {self.url}: {self.usage.line()}"

    def _ask_and_keep(self, body: dict[str, Any], path: Path) -> str:
        start = time.perf_counter()
        try:
            # A thread with an event loop of its own: Jupyter's is busy, and only such a loop can break off any wait.
            with start_blocking_portal() as portal:
                reply = portal.call(self._ask, body)
        finally:
            self.usage.seconds += time.perf_counter() - start
        if reply.usage:
            self.usage.prompt_tokens += reply.usage.prompt_tokens
            self.usage.completion_tokens += reply.usage.completion_tokens
        text = _without_key(reply.text)
        _keep(path, body, text)
        return text

    async def _ask(self, body: dict[str, Any]) -> _Reply:
        """One answer within the deadline, asked for as often as it takes."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(multiplier=self.backoff, max=self.deadline, jitter=self.backoff / 2),
            retry=retry_if_exception_type(TemporaryError),
            reraise=True,
        )
        try:
            with anyio.fail_after(self.deadline):
                async with httpx.AsyncClient(timeout=None) as client:
                    return await retrying(self._post, client, body)
        except TimeoutError:
            raise LabError(
                f"{self._name} did not finish within {self.deadline:g} s; is it overloaded, or the wrong server?"
            ) from None

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> _Reply:
        """One request."""
        self.usage.requests += 1
        address = f"{self.url.rstrip('/')}/chat/completions"
        try:
            async with client.stream("POST", address, json=body, headers=_headers()) as response:
                content = await self._read(response)
        except httpx.ConnectError as error:
            raise TemporaryError(
                f"{self._name} could not be reached {self.attempts} times ({error}); start the server or correct "
                "EVIDENCE_URL"
            ) from None
        except httpx.RequestError as error:
            raise TemporaryError(
                f"{self._name} broke off {self.attempts} times ({type(error).__name__}); look at the server's own log"
            ) from None
        self._require_success(response.status_code, content)
        return self._parse(content)

    async def _read(self, response: httpx.Response) -> bytes:
        """The body of a response, as long as it is of a size that evidence can have."""
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > MAX_BYTES:
                raise LabError(f"{self._name} sent more than {MAX_BYTES:,} bytes; expected one short chat completion")
        return bytes(content)

    def _require_success(self, status: int, content: bytes) -> None:
        if status == 429:
            raise TemporaryError(
                f"{self._name} had too many requests (HTTP 429) {self.attempts} times; wait and run again, or check "
                "your quota: what it answered before is cached"
            )
        if status >= 500:
            raise TemporaryError(f"{self._name} failed (HTTP {status}) {self.attempts} times; look at its own log")
        if status in (401, 403):
            raise LabError(f"{self._name} refused the key (HTTP {status}); set EVIDENCE_KEY to a valid one")
        if status != 200:
            said = " ".join(_without_key(content.decode(errors="replace")).split())[:EXCERPT]
            raise LabError(f"{self._name} answered HTTP {status}; check EVIDENCE_URL and EVIDENCE_MODEL: {said}")

    def _parse(self, content: bytes) -> _Reply:
        try:
            reply = _Reply.model_validate_json(content)
        except ValidationError as report:
            mistake = report.errors(include_input=False)[0]
            place = ".".join(map(str, mistake["loc"])) or "body"
            raise LabError(
                f"{self._name} answered no chat completion ({place}: {mistake['msg']}); "
                "is EVIDENCE_URL the root of an OpenAI-compatible API?"
            ) from None
        if not reply.text:
            raise LabError(f"{self._name} gave an empty answer; run again, or choose another EVIDENCE_MODEL")
        return reply

    @property
    def _name(self) -> str:
        return f"the external LLM at {self.url}"


def _headers() -> dict[str, str]:
    # uncompressed, so that a small reply cannot unfold into gigabytes
    headers, key = {"Accept-Encoding": "identity"}, _key()
    return headers | {"Authorization": f"Bearer {key}"} if key else headers


def _key() -> str:
    """The key, which only the environment holds."""
    key = os.environ.get("EVIDENCE_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise LabError("EVIDENCE_KEY holds a space or a character outside ASCII; copy the key again")
    return key


def _without_key(text: str) -> str:
    key = _key()
    return text.replace(key, "[key]") if len(key) >= SECRET else text


def _cached(path: Path) -> str | None:
    """The answer in a cache file; None where there is none or the file is damaged."""
    try:
        answer = read_json(path)["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if answer and isinstance(answer, str) else None


def _keep(path: Path, body: dict[str, Any], answer: str) -> None:
    """Write a cache file whole or not at all, though another process may be writing the same one."""
    partial = path.with_name(f".partial-{uuid4().hex}")
    try:
        partial.write_text(json.dumps({"request": body, "answer": answer}, indent=2), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise LabError(f"{path.parent} cannot hold cached evidence ({error.strerror}); make room or move it") from None
    finally:
        partial.unlink(missing_ok=True)
