"""A language model behind an OpenAI-compatible API, asked through OpenAI's own client.

What such a server sends is not to be trusted: it may be slow, endless, no JSON, an error under a status of success, or
thoughts where an answer should be. Whatever is no answer is refused in one line, and nothing of it is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx2
import openai
from anyio.from_thread import start_blocking_portal
from pydantic import ValidationError

from helpers.core.checking import first_mistake
from helpers.core.errors import LabError
from helpers.model.llm_cache import cached_answer, keep_answer
from helpers.model.llm_reply import FILTERED, Choice, Failure, Reply, Usage, asked_wait, is_answer

MAX_BYTES = 1_000_000  # an answer is a few sentences; an endpoint that sends more gives none
EXCERPT = 200  # characters of a server's complaint that an error repeats
SECRET = 8  # shorter keys, such as the "x" of a local server, are placeholders and no secrets
# headers that are sent beside the lab's own two; the last is how OpenAI's client remembers to leave the reply alone
SENT = {"accept", "connection", "content-length", "content-type", "host", "user-agent", "x-stainless-raw-response"}
SURROUNDINGS = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE"


class TemporaryError(LabError):
    """A failure that may be over at the next attempt, `wait` seconds from now where the server says so."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """A language model behind an OpenAI-compatible API, with a cache, retries and an end to every wait.

    The key is read from EVIDENCE_KEY for each prompt and kept nowhere; where a server repeats it, it is blotted out.
    Nothing but the prompt, the settings below and the key is sent. Connection faults, HTTP 429 and 5xx are tried again,
    after as long as the server asks for (Retry-After), else each time after twice as long; nothing else is.

    Args:
        url: the API's root, such as http://localhost:8000/v1.
        model: its name on that server.
        cache: folder of answers, one JSON file each, keyed by prompt, model, temperature and `max_tokens`; an answer
            is sampled once and then stays. Made on demand.
        temperature: 0.7 as in §4.2.
        max_tokens: the longest answer, thoughts included.
        deadline: seconds that one prompt may take, retries and slow replies included.
        attempts: requests at most for one prompt.
        backoff: seconds before the second attempt.

    Raises:
        LabError: an address without http(s), host or possible port, or with a password or query; a cache that cannot
            be a folder.
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
        if not _is_address(self.url):
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
        known = cached_answer(path)
        self.usage.prompts += 1
        self.usage.cached += known is not None
        return self._ask_and_keep(body, path) if known is None else known

    def origin(self) -> str:
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
        self.usage.prompt_tokens += reply.tokens("prompt_tokens")
        self.usage.completion_tokens += reply.tokens("completion_tokens")
        text = _without_key(reply.choices[0].message.text)
        keep_answer(path, body, text)
        return text

    async def _ask(self, body: dict[str, Any]) -> Reply:
        """One reply within the deadline, asked for as often as it takes."""
        try:
            with anyio.fail_after(self.deadline) as scope:
                async with self._client() as client:
                    # not the client's own retries: they do not know the deadline
                    for attempt in range(1, self.attempts):
                        try:
                            return await self._post(client, body, attempt)
                        except TemporaryError as error:
                            await anyio.sleep(self._wait(error, attempt, scope.deadline - anyio.current_time()))
                    return await self._post(client, body, self.attempts)
        except TimeoutError:
            raise LabError(
                f"{self._name} did not finish within {self.deadline:g} s; is it overloaded, or the wrong server?"
            ) from None

    def _wait(self, error: TemporaryError, attempt: int, left: float) -> float:
        """Seconds until the next attempt; raises the error where the server asks for more than are left."""
        if error.wait > left:
            raise LabError(f"{error}; it asks to wait {error.wait:.0f} s, a prompt may take {self.deadline:g} s in all")
        return error.wait or self.backoff * (2 ** (attempt - 1) + random.random() / 2)

    def _client(self) -> openai.AsyncOpenAI:
        """OpenAI's client for this address."""
        hooks = {"request": [self._prepare], "response": [self._limit]}
        try:
            http = openai.DefaultAsyncHttpxClient(timeout=None, follow_redirects=False, event_hooks=hooks)
            return openai.AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0, http_client=http)
        except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
            raise LabError(f"no connection can be set up ({_one_line(str(error))}); look at {SURROUNDINGS}") from None

    async def _prepare(self, request: httpx2.Request) -> None:
        """Count a request, give it the key, and take off what OpenAI's client tells of this machine and of OpenAI."""
        self.usage.requests += 1
        for name in set(request.headers) - SENT:
            del request.headers[name]
        request.headers["Accept-Encoding"] = "identity"  # a small reply could unfold into gigabytes
        if key := _key():
            request.headers["Authorization"] = f"Bearer {key}"

    async def _limit(self, response: httpx2.Response) -> None:
        """Let a reply be as long as an answer can be, and read it as it comes."""
        response.headers.pop("Content-Encoding", None)
        complaint = f"{self._name} sent more than {MAX_BYTES:,} bytes; expected one short chat completion"
        response.stream = _Limited(response.stream, LabError(complaint))

    async def _post(self, client: openai.AsyncOpenAI, body: dict[str, Any], attempt: int) -> Reply:
        """The reply to one attempt."""
        try:
            response = await _create(client, body)
        except openai.APIConnectionError as error:
            raise self._unreached(error.__cause__, attempt) from None
        except openai.APIStatusError as error:
            reply = error.response
            raise self._refusal(reply.status_code, reply.text, attempt, asked_wait(reply.headers)) from None
        return self._parse(response.content, attempt)

    def _unreached(self, cause: BaseException | None, attempt: int) -> TemporaryError:
        if isinstance(cause, httpx2.ConnectError):
            return TemporaryError(
                f"{self._name} could not be reached {_times(attempt)} ({cause}); start the server or correct "
                "EVIDENCE_URL"
            )
        return TemporaryError(
            f"{self._name} broke off {_times(attempt)} ({type(cause).__name__}); look at the server's own log"
        )

    def _refusal(self, status: int, said: str, attempt: int, wait: float = 0.0) -> LabError:
        """The error for a status that is no success."""
        said = _one_line(_without_key(said))[:EXCERPT]
        if status == 429:
            return TemporaryError(
                f"{self._name} had too many requests (HTTP 429) {_times(attempt)}; wait and run again, or check your "
                "quota: what it answered before is cached",
                wait,
            )
        if status >= 500:
            failed = f"{self._name} failed (HTTP {status}) {_times(attempt)}; look at its own log"
            return TemporaryError(failed, wait)
        if status in (401, 403):
            return LabError(f"{self._name} refused the key (HTTP {status}); set EVIDENCE_KEY to a valid one")
        found = "an error" if status == 200 else f"HTTP {status}"
        return LabError(f"{self._name} answered {found}; check EVIDENCE_URL and EVIDENCE_MODEL: {said}")

    def _parse(self, content: bytes, attempt: int) -> Reply:
        """A reply that calls itself a success, checked."""
        with suppress(ValidationError):
            self._require_no_error(Failure.model_validate_json(content).error, attempt)
        try:
            reply = Reply.model_validate_json(content)
        except ValidationError as report:
            raise LabError(
                f"{self._name} answered no chat completion ({first_mistake(report, 'body')}); "
                "is EVIDENCE_URL the root of an OpenAI-compatible API?"
            ) from None
        self._require_no_error(reply.choices[0].error, attempt)
        self._require_answer(reply.choices[0])
        return reply

    def _require_no_error(self, failure: Any, attempt: int) -> None:
        if failure:
            code = failure.get("code") if isinstance(failure, dict) else None
            raise self._refusal(code if isinstance(code, int) else 200, json.dumps(failure), attempt)

    def _require_answer(self, choice: Choice) -> None:
        said = choice.message.text
        if "\0" in said:
            raise LabError(
                f"{self._name} answered no text but something with a NUL in it; look at the server's own log"
            )
        if is_answer(said) and choice.finish_reason == FILTERED:
            raise LabError(
                f"{self._name} was cut off by its filter (finish_reason: {FILTERED}); choose another EVIDENCE_MODEL"
            )
        if is_answer(said):
            return
        if choice.finish_reason == "length":
            raise LabError(
                f"{self._name} used up its {self.max_tokens} tokens before it answered (finish_reason: length); set "
                "EVIDENCE_TOKENS to more, or EVIDENCE_MODEL to one that does not think first"
            )
        why = f" (finish_reason: {_one_line(str(choice.finish_reason))[:EXCERPT]})" if choice.finish_reason else ""
        raise LabError(f"{self._name} gave an empty answer{why}; run again, or choose another EVIDENCE_MODEL")

    @property
    def _name(self) -> str:
        return f"the external LLM at {self.url}"


class _Limited(httpx2.AsyncByteStream):
    """A reply's bytes, with an end."""

    def __init__(self, stream: httpx2.AsyncByteStream, complaint: LabError):
        self.stream, self.complaint = stream, complaint

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self.stream:
            size += len(chunk)
            if size > MAX_BYTES:
                raise self.complaint
            yield chunk

    async def aclose(self) -> None:
        await self.stream.aclose()


async def _create(client: openai.AsyncOpenAI, body: dict[str, Any]) -> Any:
    """The response to a request; a server that knows the longest answer by its newer name alone is asked by that."""
    create = client.chat.completions.with_raw_response.create
    try:
        return await create(**body)
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        if "max_completion_tokens" not in error.response.text:
            raise
    newer = {"max_completion_tokens" if key == "max_tokens" else key: value for key, value in body.items()}
    return await create(**newer)


def _is_address(url: str) -> bool:
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    possible = address.port is None or 0 < address.port < 2**16
    return possible and bool(re.fullmatch(r"https?://[^\s/#]+(/[^\s#]*)?", url))


def _times(attempts: int) -> str:
    return "once" if attempts == 1 else f"{attempts} times"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _key() -> str:
    """The key, which only the environment holds."""
    key = os.environ.get("EVIDENCE_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise LabError("EVIDENCE_KEY holds a space or a character outside ASCII; copy the key again")
    return key


def _without_key(text: str) -> str:
    key = _key()
    return text.replace(key, "[key]") if len(key) >= SECRET else text
