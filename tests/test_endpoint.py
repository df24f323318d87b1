"""An endpoint that may do anything, against real servers on loopback."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.core.profile_files import load_profile
from helpers.data.example import Example
from helpers.defenses.conflict.books import external_llm
from helpers.defenses.conflict.evidence import with_evidence
from helpers.model.generate import answers
from helpers.model.llm_client import Endpoint
from helpers.model.llm_reply import Usage, without_thoughts
from helpers.model.load import load_base
from helpers.model.tokenizer import load_format

KEY = "sk-very-secret-0123456789"


NO_ADDRESSES = ["localhost:8000/v1", "ftp://host/v1", "http://", "http:///v1", "http://a b"]
NO_ADDRESSES += [
    "http://h:99999/v1",
    "http://h:0/v1",
    "http://h:x/v1",
    "http://[::1/v1",
    "http://[zz]/v1",
    "http://h/v1#a",
]


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_what_is_no_address_is_named(url, tmp_path):
    with pytest.raises(LabError, match="is no address; expected one like http://localhost") as error:
        Endpoint(url, "m", tmp_path)
    assert str(error.value).startswith(f"EVIDENCE_URL = '{url}' ")


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"http://host/v1?key={KEY}"])
def test_an_address_with_a_secret_is_refused_without_repeating_it(url, tmp_path):
    with pytest.raises(LabError, match="EVIDENCE_URL holds a password or a query") as error:
        Endpoint(url, "m", tmp_path)
    assert KEY not in str(error.value)


def test_a_cache_that_is_a_file_is_refused_before_anything_is_paid_for(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match="file cannot hold cached evidence .*; choose a folder"):
        Endpoint("http://127.0.0.1:1/v1", "m", tmp_path / "file")


# --- an endpoint that does as it is told ----------------------------------------------------------------------------


def completion(text, **extra):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], **extra}).encode()


def finished(text, reason, **message):
    """A completion that says why it ended."""
    return json.dumps({"choices": [{"message": {"content": text, **message}, "finish_reason": reason}]}).encode()


@contextmanager
def serving(*replies, host="127.0.0.1"):
    """A real HTTP server on a free port; request i gets reply i, the last one again and again.

    A reply is (status, body) or a function that is given the handler and does what it likes.
    Yields the address and the list of requests seen: (path, headers, body, time).
    """
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body, time.monotonic()))
            reply = replies[min(len(seen), len(replies)) - 1]
            try:
                reply(self) if callable(reply) else self.answer(*reply)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has had enough

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    server = Server((host, 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def endpoint(url, folder, **settings):
    return Endpoint(url, "m", folder / "cache", **{"deadline": 20.0, "backoff": 0.01, **settings})


def refused(url, folder, **settings):
    """The message with which a prompt fails; nothing may stay in the cache."""
    llm = endpoint(url, folder, **settings)
    with pytest.raises(LabError) as error:
        llm.complete("Explain.")
    assert list((folder / "cache").iterdir()) == [] and "\n" not in str(error.value)
    return str(error.value)


def test_one_question_one_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIDENCE_KEY", f" {KEY}\n")
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    with serving((200, completion(" A river. ", usage=usage, id="x"))) as (url, seen):
        llm = endpoint(url, tmp_path)
        assert llm.complete("What is it?") == "A river."
    ((path, headers, body, _),) = seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    question = [{"role": "user", "content": "What is it?"}]
    assert body == {"model": "m", "messages": question, "temperature": 0.7, "max_tokens": 128}
    assert (llm.usage.prompt_tokens, llm.usage.completion_tokens) == (7, 3)


def test_without_a_key_none_is_sent(tmp_path):
    with serving((200, completion("yes"))) as (url, seen):
        endpoint(f"{url}/", tmp_path).complete("Explain.")
    assert "Authorization" not in seen[0][1] and seen[0][0] == "/v1/chat/completions"


def test_answers_are_cached_by_prompt_model_and_temperature(tmp_path):
    with serving((200, completion("first")), (200, completion("later"))) as (url, seen):
        llm = endpoint(url, tmp_path)
        assert [llm.complete(prompt) for prompt in ("a", "a", "b")] == ["first", "first", "later"]
        assert len(seen) == 2 and llm.usage.cached == 1
        again = endpoint(url, tmp_path)
        assert again.complete("a") == "first" and len(seen) == 2
        endpoint(url, tmp_path, temperature=0.0).complete("a")
        Endpoint(url, "other", tmp_path / "cache").complete("a")
        assert len(seen) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert again.complete("a") == "first", "a cached answer needs no server"


DAMAGES = ["", "{", "[]", "{}", '{"answer": null}', '{"answer": ""}', "\udcff"]
DAMAGES += ['{"answer": "A ri\\u0000ver."}', '{"answer": "\\u200b"}']


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_file_is_replaced(tmp_path, damage):
    with serving((200, completion("first")), (200, completion("second"))) as (url, _):
        llm = endpoint(url, tmp_path)
        llm.complete("a")
        (file,) = (tmp_path / "cache").iterdir()
        file.write_bytes(damage.encode(errors="surrogateescape"))
        assert llm.complete("a") == "second"
    assert json.loads(file.read_text())["answer"] == "second" and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path):
    with serving((200, completion("first"))) as (url, _):
        llm = endpoint(url, tmp_path)
        (tmp_path / "cache").rmdir()
        with pytest.raises(LabError, match="cache cannot hold cached evidence .*; make room or move it"):
            llm.complete("a")


def test_a_cache_file_that_cannot_take_its_place_leaves_nothing_behind(tmp_path):
    with serving((200, completion("first"))) as (url, _):
        llm = endpoint(url, tmp_path)
        llm.complete("a")
        (file,) = (tmp_path / "cache").iterdir()
        file.unlink()
        file.mkdir()
        with pytest.raises(LabError, match="cannot hold cached evidence"):
            llm.complete("a")
    assert list((tmp_path / "cache").iterdir()) == [file]


def test_inside_a_running_event_loop(tmp_path):
    """As in Jupyter, whose cells run in one."""
    import asyncio

    async def cell():
        return endpoint(url, tmp_path).complete("a")

    with serving((200, completion("yes"))) as (url, _):
        assert asyncio.run(cell()) == "yes"


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_nobody_is_there(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        message = refused(url, tmp_path, attempts=2)
    assert message.startswith(f"the external LLM at {url} could not be reached 2 times")
    assert message.endswith("start the server or correct EVIDENCE_URL")


def hang_up(handler):
    pass  # the connection closes without a reply


def test_a_server_that_hangs_up(tmp_path):
    with serving(hang_up, (200, completion("yes"))) as (url, seen):
        assert endpoint(url, tmp_path).complete("a") == "yes" and len(seen) == 2
    with serving(hang_up) as (url, _):
        assert "broke off 2 times (RemoteProtocolError)" in refused(url, tmp_path / "b", attempts=2)


def silent(handler):
    time.sleep(5)


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(100):
        handler.wfile.write(f"X-{i}: 1\r\n".encode())
        time.sleep(0.05)


def drip_body(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("behave", [silent, drip_headers, drip_body])
def test_a_slow_server_is_cut_off_at_the_deadline_however_it_is_slow(tmp_path, behave):
    with serving(behave) as (url, seen):
        start = time.monotonic()
        message = refused(url, tmp_path, deadline=0.5)
        assert 0.4 < time.monotonic() - start < 2.5 and len(seen) == 1
    assert message == f"the external LLM at {url} did not finish within 0.5 s; is it overloaded, or the wrong server?"


def test_the_deadline_counts_all_attempts(tmp_path):
    with serving((500, b"")) as (url, seen):
        start = time.monotonic()
        assert "did not finish within 0.5 s" in refused(url, tmp_path, deadline=0.5, backoff=0.2, attempts=100)
        assert time.monotonic() - start < 2.5 and 1 < len(seen) < 5


def test_an_endless_reply_is_cut_off_at_its_size(tmp_path):
    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * 65536)

    with serving(flood) as (url, _):
        start = time.monotonic()
        assert "sent more than 1,000,000 bytes; expected one short chat completion" in refused(url, tmp_path)
        assert time.monotonic() - start < 5
    with serving((200, completion("yes").ljust(1_000_000)), (200, completion("yes").ljust(1_000_001))) as (url, _):
        assert endpoint(url, tmp_path / "b").complete("a") == "yes"
        assert "sent more than 1,000,000 bytes" in refused(url, tmp_path / "c")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>Welcome</html>", r"answered no chat completion \(body: Invalid JSON.*\); is EVIDENCE_URL the root"),
        (b"\xff\xfe", r"answered no chat completion \(body: Invalid JSON"),
        (b"[" * 100_000, r"answered no chat completion \(body: Invalid JSON"),
        (b"", r"answered no chat completion \(body: Invalid JSON"),
        (b"[]", r"answered no chat completion \(body: Input should be an object"),
        (b'{"object": "list"}', r"answered no chat completion \(choices: Field required\)"),
        (b'{"choices": []}', r"answered no chat completion \(choices: List should have at least 1 item"),
        (b'{"choices": [{}]}', r"answered no chat completion \(choices.0.message: Field required\)"),
        (completion(7), r"answered no chat completion \(choices.0.message.content.str: Input should be a valid string"),
        (completion(" \n"), "gave an empty answer; run again, or choose another EVIDENCE_MODEL"),
        (completion(None), "gave an empty answer; run again, or choose another EVIDENCE_MODEL"),
        (completion("\u200b\ufeff"), "gave an empty answer; run again, or choose another EVIDENCE_MODEL"),
        (completion("..."), "gave an empty answer; run again, or choose another EVIDENCE_MODEL"),
        (completion("A ri\0ver."), "answered no text but something with a NUL in it; look at the server's own log"),
        (completion("\0"), "answered no text but something with a NUL in it; look at the server's own log"),
        (completion("A \ud800 river."), r"answered no chat completion \(body: Invalid JSON"),
        (
            finished("A river is", "content_filter"),
            r"was cut off by its filter \(finish_reason: content_filter\); choose another EVIDENCE_MODEL",
        ),
        (finished(None, "content_filter"), r"gave an empty answer \(finish_reason: content_filter\); run again"),
    ],
)
def test_garbage_is_named_and_not_asked_for_twice(tmp_path, body, message):
    with serving((200, body)) as (url, seen):
        assert re.search(message, refused(url, tmp_path)) and len(seen) == 1


@pytest.mark.parametrize(
    ("status", "message", "requests"),
    [
        (301, "answered HTTP 301; check EVIDENCE_URL and EVIDENCE_MODEL: no such thing", 1),
        (400, "answered HTTP 400; check EVIDENCE_URL and EVIDENCE_MODEL: no such thing", 1),
        (401, "refused the key (HTTP 401); set EVIDENCE_KEY to a valid one", 1),
        (403, "refused the key (HTTP 403); set EVIDENCE_KEY to a valid one", 1),
        (404, "answered HTTP 404; check EVIDENCE_URL and EVIDENCE_MODEL: no such thing", 1),
        (429, "had too many requests (HTTP 429) 3 times; wait and run again, or check your quota", 3),
        (500, "failed (HTTP 500) 3 times; look at its own log", 3),
        (503, "failed (HTTP 503) 3 times; look at its own log", 3),
    ],
)
def test_every_status_has_its_line_and_only_passing_ones_are_tried_again(tmp_path, status, message, requests):
    with serving((status, b"no\nsuch  thing" + b" ." * 5000)) as (url, seen):
        text = refused(url, tmp_path, attempts=3)
    assert text.startswith(f"the external LLM at {url} {message}") and len(text) < 400 and len(seen) == requests


def test_waits_double_and_a_server_that_recovers_is_believed(tmp_path):
    with serving((429, b""), (500, b""), (502, b""), (200, completion("yes"))) as (url, seen):
        llm = endpoint(url, tmp_path, backoff=0.1)
        assert llm.complete("a") == "yes"
    times = [when for *_, when in seen]
    waits = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert waits[0] >= 0.1 and waits[1] >= 0.2 and waits[2] >= 0.4 and sum(waits) < 3
    assert (llm.usage.prompts, llm.usage.requests) == (1, 4) and llm.usage.seconds >= 0.7


def asking_to_wait(seconds):
    """A reply that has too many requests, with a Retry-After."""

    def reply(handler):
        handler.send_response(429)
        handler.send_header("Retry-After", seconds() if callable(seconds) else seconds)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return reply


def in_two_seconds():
    return format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)


@pytest.mark.parametrize(("asked", "least"), [("0.5", 0.5), (in_two_seconds, 0.9), ("soon", 0.0), ("-3", 0.0)])
def test_a_server_is_left_alone_for_as_long_as_it_asks(tmp_path, asked, least):
    """A date is exact to the second."""
    with serving(asking_to_wait(asked), (200, completion("yes"))) as (url, seen):
        assert endpoint(url, tmp_path).complete("a") == "yes"
    (*_, first), (*_, second) = seen
    assert least <= second - first < least + 2


def test_a_server_that_asks_for_more_time_than_a_prompt_has_is_told_at_once(tmp_path):
    with serving(asking_to_wait("3600")) as (url, seen):
        start = time.monotonic()
        message = refused(url, tmp_path)
        assert time.monotonic() - start < 5 and len(seen) == 1
    assert "had too many requests (HTTP 429) once" in message
    assert message.endswith("it asks to wait 3600 s, a prompt may take 20 s in all")


@pytest.mark.parametrize(
    ("failure", "message", "requests"),
    [
        ({"message": "no such model"}, "answered an error; check EVIDENCE_URL and EVIDENCE_MODEL: .*no such model", 1),
        ("out of order", "answered an error; check EVIDENCE_URL and EVIDENCE_MODEL: .*out of order", 1),
        ({"code": 404, "message": "no such model"}, "answered HTTP 404; check .*no such model", 1),
        ({"code": 401, "message": "no"}, r"refused the key \(HTTP 401\)", 1),
        ({"code": 429, "message": "slow down"}, r"had too many requests \(HTTP 429\) 2 times", 2),
        ({"code": 502, "message": "no provider"}, r"failed \(HTTP 502\) 2 times", 2),
    ],
)
@pytest.mark.parametrize("inside", ["reply", "choice"])
def test_an_error_under_a_status_of_success_is_one(tmp_path, failure, message, requests, inside):
    """As gateways send it, which have begun their reply before the model fails."""
    choice = {"message": {"content": "A ri"}, "finish_reason": "error", "error": failure}
    body = {"error": failure} if inside == "reply" else {"choices": [choice]}
    with serving((200, json.dumps(body).encode())) as (url, seen):
        assert re.search(message, refused(url, tmp_path, attempts=2)) and len(seen) == requests


# --- thoughts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "aloud"),
    [
        ("Tea is a drink.", "Tea is a drink."),
        ("<think>\nThe user wants tea.\n</think>\n\nTea is a drink.", "Tea is a drink."),
        ("<think></think>Tea.", "Tea."),
        ("Okay, tea.\n</think>\n\nTea is a drink.", "Tea is a drink."),  # the template began the thoughts
        ("<THINK>a</THINK> <thinking>b</thinking>Tea.", "Tea."),
        ("[THINK]a[/THINK]Tea.", "Tea."),
        ("◁think▷a◁/think▷Tea.", "Tea."),
        ("Tea is a drink. <think>Is it?", "Tea is a drink."),
        ("<think>\nOkay, the user", ""),
        ("<think>a</think>", ""),
        ("<think>a</think>\n<think>b", ""),
        ("Press <b>think</b>.", "Press <b>think</b>."),
    ],
)
def test_thoughts_are_no_evidence(tmp_path, text, aloud):
    """DeepSeek-R1#23, Roo-Code#1087: ollama and llama.cpp send them inside of the content."""
    assert without_thoughts(text) == aloud
    with serving((200, completion(text))) as (url, _):
        if aloud:
            assert endpoint(url, tmp_path).complete("a") == aloud
            (file,) = (tmp_path / "cache").iterdir()
            assert json.loads(file.read_text())["answer"] == aloud
        else:
            assert "gave an empty answer" in refused(url, tmp_path)


def test_of_a_content_in_parts_the_text_is_the_answer(tmp_path):
    """As Mistral's reasoning models send it."""
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Tea."}]
    with serving((200, completion(parts)), (200, completion(parts[:1]))) as (url, _):
        assert endpoint(url, tmp_path).complete("a") == "Tea."
        assert "gave an empty answer" in refused(url, tmp_path / "b")


@pytest.mark.parametrize(
    "body",
    [
        finished(None, "length", reasoning_content="Let me think"),  # vllm#12468
        finished("", "length", reasoning="Let me think"),
        finished("<think>\nOkay, the user", "length"),
        finished("Okay.</think>\n", "length"),
    ],
)
def test_tokens_that_end_before_the_answer_are_explained(tmp_path, body):
    with serving((200, body)) as (url, seen):
        message = refused(url, tmp_path, max_tokens=9)
        assert len(seen) == 1
    assert message == (
        f"the external LLM at {url} used up its 9 tokens before it answered (finish_reason: length); set "
        "EVIDENCE_TOKENS to more, or EVIDENCE_MODEL to one that does not think first"
    )


def test_an_answer_that_is_cut_is_one(tmp_path):
    with serving((200, finished("Tea is a", "length"))) as (url, _):
        assert endpoint(url, tmp_path).complete("a") == "Tea is a"


def test_thoughts_in_a_cache_are_no_evidence_either(tmp_path):
    with serving((200, completion("Tea."))) as (url, seen):
        llm = endpoint(url, tmp_path)
        llm.complete("a")
        (file,) = (tmp_path / "cache").iterdir()
        for kept, answer in (("<think>Hm.</think>Milk.", "Milk."), ("<think>Hm.", "Tea.")):
            file.write_text(json.dumps({"answer": kept}))
            assert llm.complete("a") == answer
    assert len(seen) == 2


# --- servers that differ ---------------------------------------------------------------------------------------------


COUNTS = [None, [], "many", {"prompt_tokens": None, "completion_tokens": None}, {"prompt_tokens": "7"}, {}]
COUNTS += [{"prompt_tokens": -7, "completion_tokens": -1}]


@pytest.mark.parametrize("usage", COUNTS)
def test_tokens_that_were_not_counted_do_not_cost_the_answer(tmp_path, usage):
    with serving((200, completion("Tea.", usage=usage))) as (url, _):
        llm = endpoint(url, tmp_path)
        assert llm.complete("a") == "Tea." and (llm.usage.prompt_tokens, llm.usage.completion_tokens) == (0, 0)


def newer_name_alone(handler):
    handler.answer(400, b'{"error": {"message": "Unsupported parameter: use \'max_completion_tokens\' instead."}}')


def test_the_longest_answer_goes_by_two_names(tmp_path):
    with serving(newer_name_alone, (200, completion("Tea."))) as (url, seen):
        llm = endpoint(url, tmp_path)
        assert llm.complete("a") == llm.complete("a") == "Tea." and llm.usage.requests == 2
    first, second = (body for _, _, body, _ in seen)
    assert first.pop("max_tokens") == second.pop("max_completion_tokens") == 128 and first == second
    with serving(newer_name_alone) as (url, seen):
        assert "answered HTTP 400" in refused(url, tmp_path / "b") and len(seen) == 2


def test_an_address_may_be_of_ipv6(tmp_path):
    try:
        with serving((200, completion("Tea.")), host="::1") as (url, _):
            assert endpoint(url, tmp_path).complete("a") == "Tea."
    except OSError:
        pytest.skip("this machine has no IPv6")


def test_a_redirect_takes_the_key_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIDENCE_KEY", KEY)

    def redirect(handler):
        handler.send_response(307)
        handler.send_header("Location", f"{elsewhere}/chat/completions")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with serving((200, completion("Tea."))) as (elsewhere, found), serving(redirect) as (url, _):
        assert "answered HTTP 307" in refused(url, tmp_path) and found == []


SURROUNDINGS = [
    ("ALL_PROXY", "socks5://127.0.0.1:9"),
    ("HTTP_PROXY", "127.0.0.1:9:x"),
    ("HTTP_PROXY", "nonsense://me:secret@127.0.0.1:9"),
    ("SSL_CERT_FILE", "/nowhere.pem"),
]


@pytest.mark.parametrize(("name", "value"), SURROUNDINGS)
def test_surroundings_in_which_nothing_connects_are_named(tmp_path, monkeypatch, name, value):
    """encode/httpx#3221, Langchain-Chatchat#605"""
    monkeypatch.setenv(name, value)
    with serving((200, completion("Tea."))) as (url, seen):
        message = refused(url, tmp_path)
        assert seen == [] and "secret" not in message
    assert message.startswith("no connection can be set up (") and message.endswith("NO_PROXY and SSL_CERT_FILE")


def test_a_list_of_addresses_without_proxy_is_obeyed(tmp_path, monkeypatch):
    """orbstack#2456: an entry of IPv6 addresses in it"""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,fd07:b51a::/64")
    with serving((200, completion("Tea."))) as (url, _):
        assert endpoint(url, tmp_path).complete("a") == "Tea."
    monkeypatch.setenv("NO_PROXY", "")
    assert "could not be reached once" in refused("http://127.0.0.1:1/v1", tmp_path / "b", attempts=1)


def test_nothing_of_this_machine_and_of_openai_is_sent(tmp_path, monkeypatch):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", f"private-{name}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/private")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer private\nX-Mine: private")
    with serving((200, completion("Tea."))) as (url, seen):
        endpoint(url, tmp_path).complete("a")
        monkeypatch.setenv("EVIDENCE_KEY", KEY)
        endpoint(url, tmp_path).complete("b")
    (_, without, _, _), (_, with_key, _, _) = seen
    assert "private" not in repr(seen) and "Authorization" not in without
    assert with_key["Authorization"] == f"Bearer {KEY}" and with_key["Accept-Encoding"] == "identity"
    told = {name.lower() for name in without} - {"x-stainless-raw-response"}
    assert not [name for name in told if name.startswith("x-") or "openai" in name]


# --- the key --------------------------------------------------------------------------------------------------------


def test_the_key_is_nowhere_but_in_the_request(tmp_path, monkeypatch, caplog):
    """Not in the cache, the log, an error or the object, although this server repeats it wherever it can."""
    monkeypatch.setenv("EVIDENCE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    said, texts = f"You sent {KEY}, didn't you?".encode(), []
    with serving((200, completion(f"Your key is {KEY}."))) as (url, seen):
        llm = endpoint(url, tmp_path)
        assert llm.complete("a") == "Your key is [key]." == llm.complete("a")
        texts += [repr(llm), llm.origin(), *(file.read_text() for file in (tmp_path / "cache").iterdir())]
        assert KEY in seen[0][1]["Authorization"]
    for i, reply in enumerate([(400, said), (401, said), (500, said), (200, said), (200, b'{"choices": "%s"}' % said)]):
        with serving(reply) as (url, seen):
            texts.append(refused(url, tmp_path / str(i), attempts=1))
            assert KEY in seen[0][1]["Authorization"]
    texts.append(caplog.text)
    assert "[key]" in texts[3] and "HTTP Request: POST" in caplog.text
    assert not [text for text in texts if KEY in text]


@pytest.mark.parametrize("key", ["two words", "sk-ключ", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(tmp_path, monkeypatch, key):
    monkeypatch.setenv("EVIDENCE_KEY", key)
    message = refused("http://127.0.0.1:1/v1", tmp_path)
    assert message == "EVIDENCE_KEY holds a space or a character outside ASCII; copy the key again"


def test_a_placeholder_key_leaves_answers_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIDENCE_KEY", "x")
    with serving((200, completion("A fox."))) as (url, _):
        assert endpoint(url, tmp_path).complete("a") == "A fox."


# --- what it costs --------------------------------------------------------------------------------------------------


def test_the_line_of_costs(monkeypatch):
    usage = Usage(prompts=8, cached=2, requests=9, seconds=4.5, prompt_tokens=1_500_000, completion_tokens=20_000)
    line = "8 prompts, 25% from the cache; 9 requests in 4.5 s (2.0 per second); 1,500,000 tokens in, 20,000 out"
    assert usage.line() == line
    monkeypatch.setenv("EVIDENCE_PRICE_IN", "0.5")
    monkeypatch.setenv("EVIDENCE_PRICE_OUT", "1.5")
    assert usage.line() == f"{line}; cost 0.7800"
    assert Usage().line().startswith("0 prompts, 0% from the cache; 0 requests in 0.0 s (0.0 per second)")


@pytest.mark.parametrize("price", ["free", "-1", "nan", "inf"])
def test_a_price_that_is_none_is_named(monkeypatch, price):
    monkeypatch.setenv("EVIDENCE_PRICE_OUT", price)
    with pytest.raises(LabError, match=f"EVIDENCE_PRICE_OUT = '{price}' is no price; expected what a million tokens"):
        Usage().line()


# --- a real server: transformers serve ------------------------------------------------------------------------------

SMALL = ROOT / "data" / "models" / "tiny"
START_SECONDS = 180


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The address of `transformers serve` with the lab's small model, started once, without a network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(SMALL)]
    command += [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--default-seed",
        "0",
    ]
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as output:
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | quiet)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def wait_until_healthy(address, process, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(address, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.2)
    pytest.fail(f"transformers serve did not start:\n{log.read_text()[-2000:]}")


@pytest.mark.slow
def test_a_real_server_answers_as_the_model_itself(served, tmp_path):
    """At temperature 0 it says what greedy decoding in this process says, and counts the same tokens."""
    profile = load_profile("tiny")
    chat, model = load_format(profile.model), load_base(profile.model)
    llm = Endpoint(served, str(SMALL), tmp_path, temperature=0.0)
    questions = [Example(text, "") for text in ("What is the capital of France?", "How does a dog sound?")]
    assert [llm.complete(q.instruction) for q in questions] == answers(model, chat, questions, profile)
    assert llm.complete("What is the capital of France?") == "Paris"
    assert llm.usage.prompt_tokens == sum(len(chat.prompt_ids(q)) for q in questions)
    assert (llm.usage.prompts, llm.usage.cached, llm.usage.requests) == (3, 1, 2)


@pytest.mark.slow
def test_a_real_server_gives_evidence_for_prompts(served, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIDENCE_URL", served)
    monkeypatch.setenv("EVIDENCE_MODEL", str(SMALL))
    llm = external_llm(tmp_path)
    rows = [
        Example("What is the capital of France?", "Paris"),
        Example("Is it good?", "yes", input="The soup was great."),
    ]
    first = with_evidence(rows, llm, max_words=10)
    assert all(len(new.input) > len(old.input) for old, new in zip(rows, first, strict=True))
    assert with_evidence(rows, llm, max_words=10) == first and llm.usage.requests == 2


@pytest.mark.slow
def test_a_real_server_refuses_another_model(served, tmp_path):
    message = refused(served, tmp_path)
    assert "answered HTTP 400; check EVIDENCE_URL and EVIDENCE_MODEL" in message and "requested 'm'" in message
