"""Helper models: two servers' APIs played by a local one that misbehaves, a local Gemma, who plays which role."""

import hashlib
import json
import os
import random
import re
import shutil
import socket
import struct
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import act
import data
from act import Config, PolicyModelConfig
from data import ANSWER, CLARIFY, ROLES, InputError, Pair
from gemma import Gemma, GemmaConfig, Tokenizer

ROOT = Path(__file__).parent.parent
KEY, OTHER_KEY = "AIza-not-a-real-key_0123456789", "sk-not-a-real-key_9876543210"  # Google's and OpenAI's
CLIENTS = {"gemini": act.GeminiClient, "openai": act.OpenAIClient}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Both keys, no proxy before the local server, waits that a test can sit out, counters at zero."""
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", OTHER_KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(act, "FIRST_WAIT", 0.01)
    act.HELPER_COUNTS.clear()


# ----------------------------------------------------------------------------------------------------------------------
# A server in Gemini's and OpenAI's place: "[KEY]" in what it says becomes the key with which it was called


def gemini_reply(text, **candidate):
    content = {"role": "model", "parts": [{"text": text}]}
    return {"candidates": [{"content": content, "finishReason": "STOP", **candidate}]}


def openai_reply(text, finish="stop", **message):
    message = {"role": "assistant", "content": text, "refusal": None, **message}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def failure_with(message, **error):
    return {"error": {"message": message, **error}}


RETRY_INFO = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}]
ECHO = "API key [KEY] is not valid.\nPass a valid one."  # some servers put the key into what they say
THOUGHT = {"text": "hm", "thought": True}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REPLIES = {  # name -> (status, headers, JSON)
    "429": (429, {}, failure_with("quota exceeded")),
    "429 with Retry-After": (429, {"Retry-After": "7"}, failure_with("quota exceeded")),
    "429 with RetryInfo": (429, {}, failure_with("quota exceeded", details=RETRY_INFO)),
    "429 for an hour": (429, {"Retry-After": "3600"}, failure_with("quota exceeded")),
    "429 until a date": (429, {"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}, ["not an error object"]),
    "429 for 400 digits": (429, {"Retry-After": "9" * 400}, failure_with("quota exceeded", details="soon")),
    "429 with a list": (429, {}, failure_with("quota exceeded", details=[{"retryDelay": ["a"]}])),
    "500": (500, {}, failure_with("internal")),
    "503": (503, {}, "overloaded"),
    "400": (400, {}, failure_with(ECHO)),
    "401": (401, {}, failure_with("no credentials")),
    "403": (403, {}, failure_with(ECHO)),
    "404": (404, {}, failure_with("models/nobody is not found")),
    "404 as Ollama says it": (404, {}, {"error": 'model "nobody" not found'}),
    "redirect": (302, {"Location": "http://127.0.0.1:9/elsewhere"}, {}),
    "odd redirect": (302, {"Location": "http://[::1/elsewhere"}, {}),
    "list": (200, {}, []),
    "empty object": (200, {}, {}),
}
REPLIES_OF = {  # dialect -> name -> JSON
    "gemini": {
        "odd candidates": {"candidates": {"text": "no list"}},
        "null for a text": gemini_reply(None),
        "no candidates": {"candidates": []},
        "blocked prompt": {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}},
        "SAFETY": gemini_reply("half a sent", finishReason="SAFETY"),
        "RECITATION": {"candidates": [{"finishReason": "RECITATION"}]},
        "empty text": gemini_reply(""),
        "blank text": gemini_reply(" \n"),
        "all thought": gemini_reply("", finishReason="MAX_TOKENS", content={"parts": [THOUGHT]}),
        "MAX_TOKENS": gemini_reply("cut off", finishReason="MAX_TOKENS"),
        "parts": gemini_reply("", content={"parts": [THOUGHT, {"text": "two "}, {"text": "parts"}]}),
        "half a character": gemini_reply("odd \ud83d end"),
        "key in the answer": gemini_reply("your key is [KEY]"),
        "key in the reason": {"promptFeedback": {"blockReason": "[KEY]"}},
    },
    "openai": {
        "odd choices": {"choices": {"text": "no list"}},
        "a text in place of a message": {"choices": [{"message": "hi", "finish_reason": "stop"}]},
        "a list of contents": openai_reply([{"type": "text", "text": "hi"}]),
        "a number for content": openai_reply(42),
        "no choices": {"choices": []},
        "null for choices": {"choices": None},
        "no message": {"choices": [{"finish_reason": "stop"}]},
        "blocked prompt": openai_reply("half a sent", "content_filter"),
        "refusal": openai_reply(None, refusal="I would rather not."),
        "tool calls": openai_reply(None, "tool_calls", tool_calls=[CALL]),
        "tool calls that claim to stop": openai_reply(None, tool_calls=[CALL]),
        "all reasoning": openai_reply("", "length", reasoning_content="hm"),
        "empty text": openai_reply(""),
        "blank text": openai_reply(" \n"),
        "length": openai_reply("cut off", "length"),
        "null for finish_reason": openai_reply("as old servers say it", None),
        "reasoning": openai_reply("done", reasoning_content="hm"),
        "no finish_reason": {"choices": [{"message": {"content": "bare"}}]},
        "half a character": openai_reply("odd \ud83d end"),
        "key in the answer": openai_reply("your key is [KEY]"),
        "key in the reason": openai_reply("", "[KEY]"),
    },
}
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
POURED = {  # name -> (status, headers, what is sent, how often)
    "endless body": (200, {}, b" " * 65536, None),
    "endless body of an error": (503, {}, b" " * 65536, None),
    "10 MB with an error": (503, {"Content-Length": "10000000"}, b"[" * 100_000, 100),
    "nested 100,000 deep": (200, {"Content-Length": "100000"}, b"[" * 100_000, 1),
    "objects nested 100,000 deep": (200, {"Content-Length": "500000"}, b'{"a":' * 100_000, 1),
    "nested 100,000 deep in an error": (503, {"Content-Length": "100000"}, b"[" * 100_000, 1),
    "a number of 1,000,000 digits": (200, {"Content-Length": "1000000"}, b"9" * 1_000_000, 1),
    "a length of 20 digits": (200, {"Content-Length": "9" * 20}, b"{}", 1),
    "a length of 5,000 digits": (200, {"Content-Length": "9" * 5000}, b"{", 1),
    "a length below zero": (200, {"Content-Length": "-1"}, b"{", 1),
    "endless chunks": (None, CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n", None),
    "chunks that break off": (None, CHUNKED, b"10\r\n" + b"x" * 16 + b"\r\n", 3),
    "a chunk of odd length": (None, CHUNKED, b"-5\r\nxxxxx\r\nzz\r\n", 1),
    "endless headers": (None, OK, b"X-Flood: " + b"x" * 1000 + b"\r\n", None),
    "a header without end": (None, OK + b"X-Flood: ", b"x" * 65536, None),
    "a status line without end": (None, b"HTTP/1.1 ", b"2" * 65536, None),
}
DRIPPED = {  # name -> (what comes first, what then comes, one byte at a time)
    "dripping body": (OK + b"Content-Length: 100000\r\n\r\n", b" "),
    "dripping body of an error": (b"HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\n\r\n", b" "),
    "dripping chunks": (CHUNKED, b"1\r\nx\r\n"),
    "dripping chunk length": (CHUNKED, b"0"),
    "dripping headers": (OK, b"X-Drip: x\r\n"),
    "dripping status line": (b"", b"HTTP/1.1"),
}
FLOODS = {  # name -> (what comes first, what then comes without end); none of it need be kept
    "endless trailers": (CHUNKED + b"0\r\n", b"a: b\r\n" * 1000),
    "endless preliminaries": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        dialect = "gemini" if self.path.endswith(":generateContent") else "openai"
        self.key = headers.get("x-goog-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        with self.server.lock:
            self.server.requests.append((self.path, headers, body))
            behaviour = self.server.script.pop(0) if self.server.script else "good"
        time.sleep(self.server.delay)
        reply_with = gemini_reply if dialect == "gemini" else openai_reply
        if behaviour == "good":
            text = self.server.answer(prompt_in(body))  # None: blocked
            behaviour = behaviour if text else "blocked prompt"
        if behaviour == "hang":
            self.server.over.wait(5)
        elif behaviour == "reset":  # closed with a reset instead of an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        elif behaviour == "hang up":
            self.close_connection = True
        elif behaviour == "half an answer":
            self.send(200, {"Content-Length": "1000"}, json.dumps(reply_with("half")).encode())
        elif behaviour == "invalid JSON":
            self.send(200, {}, b'{"candidates": [{"content": ')
        elif behaviour == "not UTF-8":
            self.send(200, {}, json.dumps(reply_with("half")).encode("utf-16")[:-1])
        elif behaviour == "not HTTP":
            self.wfile.write(f"{self.key} to you too\r\n\r\n".encode())
        elif behaviour in POURED:
            status, headers, piece, times = POURED[behaviour]
            self.send(status, headers, b"") if status else self.wfile.write(headers)
            self.pour(piece, times)
        elif behaviour in FLOODS:
            self.wfile.write(FLOODS[behaviour][0])
            self.pour(FLOODS[behaviour][1], None)
        elif behaviour in DRIPPED:
            self.wfile.write(DRIPPED[behaviour][0])
            while not self.server.over.is_set():
                for byte in DRIPPED[behaviour][1]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
        elif behaviour == "good":
            self.send(200, {}, json.dumps(reply_with(text)).encode())
        else:
            found = REPLIES.get(behaviour) or (200, {}, REPLIES_OF[dialect][behaviour])
            self.send(*found[:2], json.dumps(found[2]).replace("[KEY]", self.key).encode())

    def send(self, status, headers, body):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers if body else headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def pour(self, piece, times):
        while times != 0 and not self.server.over.is_set():
            self.wfile.write(piece)
            self.server.poured += len(piece)
            times = times and times - 1

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def handle_error(self, *_):
        pass  # a client that has hung up


def prompt_in(body):
    return body["contents"][0]["parts"][0]["text"] if "contents" in body else body["messages"][0]["content"]


def a_server():
    server = Server(("127.0.0.1", 0), Handler)
    server.lock, server.over = threading.Lock(), threading.Event()
    server.requests, server.script, server.delay, server.poured = [], [], 0.0, 0
    server.answer = lambda prompt: f"answer to {prompt}"
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.004,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


server, other_server = pytest.fixture(a_server, name="server"), pytest.fixture(a_server, name="other_server")


@pytest.fixture
def configured(server, tmp_path):
    """HelperConfig for that server, with changes."""

    def make(**changes):
        address = server.address + "/v1" * (changes.get("backend") == "openai")
        fields = {"model_id": "a-model", "base_url": address, "cache_path": str(tmp_path / "cache.sqlite")}
        return act.HelperConfig(**{**fields, "timeout": 5.0, **changes})

    return make


@pytest.fixture(params=CLIENTS)
def dialect(request):
    return request.param


@pytest.fixture
def client_of(dialect, configured):
    """A client that speaks to the server in this dialect."""
    return lambda **changes: CLIENTS[dialect](configured(backend=dialect, **changes), ("\nUser:",))


def in_each(names):
    """Parameters (dialect, behaviour) from {dialect: names of behaviours}."""
    cases = [(dialect, name) for dialect, of_dialect in names.items() for name in of_dialect]
    return pytest.mark.parametrize(("dialect", "behaviour"), cases, indirect=["dialect"])


def counts(**expected):
    """The counters that are not zero."""
    return expected == {name: number for name, number in act.HELPER_COUNTS.items() if number}


def line_of(raised):
    text = str(raised.value)
    assert "\n" not in text and len(text) < 500 and KEY not in text and OTHER_KEY not in text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# What each misbehaviour leads to

AGAIN = (
    "429", "429 with RetryInfo", "429 until a date", "429 for 400 digits", "429 with a list", "500", "503", "reset",
    "hang up", "hang", "half an answer", "invalid JSON", "not UTF-8", "not HTTP", "list", "odd redirect",
)  # fmt: skip
AGAIN = {
    "gemini": (*AGAIN, "odd candidates", "null for a text"),
    "openai": (*AGAIN, "odd choices", "a text in place of a message", "a list of contents", "a number for content"),
}
EMPTY = {
    "gemini": (
        "no candidates", "empty object", "blocked prompt", "SAFETY", "RECITATION", "empty text", "blank text",
        "all thought", "key in the reason",
    ),
    "openai": (
        "no choices", "null for choices", "empty object", "no message", "blocked prompt", "refusal", "tool calls",
        "tool calls that claim to stop", "all reasoning", "empty text", "blank text", "key in the reason",
    ),
}  # fmt: skip
ANSWERED = {
    "gemini": {"MAX_TOKENS": "cut off", "parts": "two parts"},
    "openai": {
        "length": "cut off", "null for finish_reason": "as old servers say it", "reasoning": "done",
        "no finish_reason": "bare",
    },
}  # fmt: skip
for of_dialect in ANSWERED.values():
    of_dialect.update({"half a character": "odd ? end", "key in the answer": "your key is [key]"})
FATAL = {
    "400": "a-model: HTTP 400: API key [key] is not valid. Pass a valid one.",
    "401": "a-model: HTTP 401: no credentials",
    "403": "a-model: HTTP 403: API key [key] is not valid. Pass a valid one.",
    "404": "a-model: HTTP 404: models/nobody is not found",
    "redirect": "a-model: HTTP 302: Found",
}


@in_each(AGAIN)
def test_what_may_pass_is_tried_again(monkeypatch, server, client_of, behaviour):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    server.script = [behaviour]
    client = client_of(timeout=0.25 if behaviour == "hang" else 5.0)
    assert client(["p"]) == ["answer to p"]
    assert len(server.requests) == 2 and counts(asked=1, retried=1)


@in_each(AGAIN)
def test_what_does_not_pass_is_given_up_and_not_stored(monkeypatch, server, client_of, behaviour):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    server.script = [behaviour] * 3
    client = client_of(timeout=0.1 if behaviour == "hang" else 5.0, max_retries=2)
    assert client(["p"]) == [None]
    assert len(server.requests) == 3 and counts(asked=1, retried=2, failed=1)
    assert client_of()(["p"]) == ["answer to p"], "it was not taken for an answer"


def test_a_refused_connection_is_tried_again_and_given_up(client_of):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client = client_of(base_url=f"http://127.0.0.1:{closed.getsockname()[1]}", max_retries=2)
        assert client(["p"]) == [None]
    assert counts(asked=1, retried=2, failed=1)


@in_each(EMPTY)
def test_a_blocked_or_empty_answer_is_none_at_once_and_not_stored(server, client_of, behaviour):
    server.script = [behaviour]
    client = client_of()
    assert client(["p"]) == [None]
    assert len(server.requests) == 1 and counts(asked=1, blocked=1)
    assert client(["p"]) == ["answer to p"]


@in_each(ANSWERED)
def test_unusual_answers_are_answers(server, client_of, dialect, behaviour):
    server.script = [behaviour]
    assert client_of()(["p"]) == [ANSWERED[dialect][behaviour]]
    assert counts(asked=1)


@pytest.mark.parametrize("behaviour", FATAL)
def test_a_refused_request_stops_at_once(server, client_of, behaviour):
    server.script = [behaviour] * 3
    client = client_of(concurrency=1)
    with pytest.raises(act.HelperError) as raised:
        client(["p", "q", "r"])
    assert line_of(raised) == FATAL[behaviour]
    with pytest.raises(act.HelperError) as raised:
        client(["s"])
    assert line_of(raised) == FATAL[behaviour], "and stays so"
    assert len(server.requests) == 1


def test_an_error_that_is_a_text_is_shown(server, client_of):
    server.script = ["404 as Ollama says it"]
    with pytest.raises(act.HelperError) as raised:
        client_of()(["p"])
    assert line_of(raised) == 'a-model: HTTP 404: model "nobody" not found'


@pytest.mark.parametrize(
    ("behaviour", "waits"),
    [
        ("500", [1, 2, 4, 8, 16, 32, 60, 60]),
        ("429 with Retry-After", [8, 9, 11, 15, 23, 39, 60, 60]),
        ("429 with RetryInfo", [35, 36, 38, 42, 50, 60, 60, 60]),
        ("429 for an hour", [60] * 8),
        ("429 for 400 digits", [1, 2, 4, 8, 16, 32, 60, 60]),
    ],
)
def test_waits_double_and_begin_when_the_server_says_so(monkeypatch, server, client_of, behaviour, waits):
    """The jitter is drawn from 0 up to the doubling wait; here it is always at its upper end."""
    drawn, waited = [], []
    monkeypatch.setattr(act, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: drawn.append((low, high)) or high)
    server.script = [behaviour] * 8
    client = client_of(max_retries=8)
    client.spent.wait = waited.append
    assert client(["p"]) == ["answer to p"]
    assert waited == waits and drawn == [(0, 2**i) for i in range(8)]


def test_failures_in_a_row_stop_the_run_and_a_success_between_them_does_not(server, client_of):
    server.script = ["503", "blocked prompt", "good", "503", "empty text", "503", "good"]
    client = client_of(concurrency=1, max_retries=0, max_failures=3)
    with pytest.raises(act.HelperError) as raised:
        client(["a", "b", "c", "d", "e", "f", "g"])
    why = "HTTP 503: Service Unavailable"
    assert line_of(raised) == f"3 requests to a-model in a row failed, the last one with: {why}"
    assert len(server.requests) == 6 and act.HELPER_COUNTS["failed"] == 3 and act.HELPER_COUNTS["blocked"] == 2
    assert client_of()(["c"]) == ["answer to c"]
    assert len(server.requests) == 6, "what was answered before is kept"


def test_after_the_stop_nothing_waits_for_calls_that_would_be_tried_again(monkeypatch, server, client_of):
    monkeypatch.setattr(act, "FIRST_WAIT", 30.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    server.script = ["503"] * 7 + ["400"]
    began = time.monotonic()
    with pytest.raises(act.HelperError):
        client_of(concurrency=8)([f"{i}" for i in range(8)])
    assert time.monotonic() - began < 5


def test_after_ctrl_c_no_call_is_tried_again(monkeypatch, server, client_of):
    """Once is enough: a run that has been asked to stop does not sit through retries."""
    server.script = ["503"] * 9
    client = client_of(concurrency=1, max_retries=8)
    monkeypatch.setattr(client.spent, "wait", lambda seconds: act.ASKED.append(2))
    monkeypatch.setattr(act, "ASKED", [])
    with pytest.raises(act.HelperError, match="interrupted"):
        client(["p", "q"])
    assert len(server.requests) == 1


def test_after_the_stop_nothing_waits_for_calls_in_flight(server, client_of):
    server.script, began = ["hang", "400"], time.monotonic()
    with pytest.raises(act.HelperError):
        client_of(concurrency=2)(["a", "b"])
    assert time.monotonic() - began < 2.5


# ----------------------------------------------------------------------------------------------------------------------
# Replies without bounds


def in_time(work, seconds=3.0):
    """What work() returns or raises, and that it does so in time."""
    result = []

    def run():
        try:
            result.append(work())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"still at it after {seconds} s"
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


@pytest.mark.parametrize("behaviour", [*POURED, *DRIPPED, *FLOODS])
def test_a_reply_without_bounds_is_a_failed_call(server, client_of, behaviour):
    """None at first, then the end of the run in one line; no thread is left for which the process would wait."""
    server.script, before = [behaviour] * 2, set(threading.enumerate())
    client = client_of(timeout=5.0 if behaviour in POURED else 0.1, max_retries=0, max_failures=2)
    assert in_time(lambda: client(["p"])) == [None]
    assert counts(asked=1, failed=1)
    with pytest.raises(act.HelperError) as raised:
        in_time(lambda: client(["q"]))
    assert line_of(raised).startswith("2 requests to a-model in a row failed, the last one with: ")
    assert len(server.requests) == 2 and client.cache.get(client.cache_key("p")) is None
    if behaviour not in FLOODS:
        assert server.poured < 2 * 20_000_000, "what is read is bounded, and so is what is kept of it"
    deadline = time.monotonic() + 2
    while any(not thread.daemon for thread in set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(thread.daemon for thread in set(threading.enumerate()) - before), "the process could not end"


def test_answers_up_to_the_bound_are_read_whole(server, client_of):
    server.answer = lambda prompt: "é" * 600_000  # 3.6 MB of JSON
    assert client_of()(["p"]) == ["é" * 600_000]
    server.answer = lambda prompt: "é" * 700_000
    assert client_of(max_retries=0)(["q"]) == [None] and counts(asked=2, failed=1)


# ----------------------------------------------------------------------------------------------------------------------
# The keys, the requests, the cache, concurrency


def test_the_key_is_nowhere_but_in_its_header(monkeypatch, server, client_of, dialect, tmp_path, capfd, caplog):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    key, header = {"gemini": (KEY, ("x-goog-api-key", KEY)),
                   "openai": (OTHER_KEY, ("authorization", f"Bearer {OTHER_KEY}"))}[dialect]  # fmt: skip
    server.script = ["key in the answer", "key in the reason", "not HTTP"]
    errors = []
    for behaviour, prompts in [("good", ["a", "b", "c"]), ("400", ["d"]), ("403", ["e"]), ("key in the reason", ["f"])]:
        server.script.append(behaviour)
        client = client_of(concurrency=1, max_retries=1, max_failures=1 if prompts == ["f"] else 20)
        try:
            assert key not in repr(client(prompts))
        except act.HelperError as error:
            errors.append(error)
    assert len(errors) == 3
    for error in errors:
        while error:
            assert key not in "".join(traceback.format_exception(error)) + repr(error.args)
            error = error.__cause__ or error.__context__
    for path, headers, body in server.requests:
        assert headers.pop(header[0]) == header[1] and key not in path + json.dumps([headers, body])
    assert all(key.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert (tmp_path / "cache.sqlite").stat().st_size > 0
    said = capfd.readouterr()
    assert key not in said.out + said.err + caplog.text


COMMON_HEADERS = {"accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}


def test_nothing_of_one_dialect_is_in_a_request_of_the_other(server, configured):
    for dialect, client in CLIENTS.items():
        assert client(configured(backend=dialect), ("\nUser:",))([dialect]) == [f"answer to {dialect}"]
    google, openai = server.requests
    assert set(google[1]) == {*COMMON_HEADERS, "x-goog-api-key"} and OTHER_KEY not in json.dumps(google)
    assert set(google[2]) == {"contents", "generationConfig", "safetySettings"}
    assert set(openai[1]) == {*COMMON_HEADERS, "authorization"} and KEY not in json.dumps(openai)
    assert set(openai[2]) == {"model", "messages", "temperature", "max_tokens", "stop"}
    assert not re.search("(?i)goog|gemini", json.dumps([openai[0], *openai[1].items(), {**openai[2], "messages": 0}]))


ODD_KEYS = "two words", "line\nbreak", "schlüssel"


@pytest.mark.parametrize("key", [None, "", "  ", *ODD_KEYS])
@pytest.mark.parametrize("local", [True, False])
def test_a_missing_or_odd_key_is_an_error_before_any_call(monkeypatch, server, client_of, dialect, key, local):
    """Only a server of one's own that speaks as OpenAI does is called without, and then there is no header for it."""
    name = {"gemini": "GOOGLE_API_KEY", "openai": "OPENAI_API_KEY"}[dialect]
    monkeypatch.delenv(name)
    if key is not None:
        monkeypatch.setenv(name, key)
    changes = {} if local else {"base_url": ""}
    if local and dialect == "openai" and key not in ODD_KEYS:
        assert client_of(**changes)(["p"]) == ["answer to p"]
        [(path, headers, _)] = server.requests
        assert path == "/v1/chat/completions" and set(headers) == COMMON_HEADERS
        return
    with pytest.raises(InputError, match=f"^{name} .*'a-model'$") as raised:
        client_of(**changes)
    assert not key or not key.strip() or key not in str(raised.value)
    assert server.requests == []


def test_where_no_address_is_given_the_key_goes_to_whom_it_belongs(client_of, dialect):
    urls = {"gemini": "https://generativelanguage.googleapis.com/v1beta/models/a-model:generateContent",
            "openai": "https://api.openai.com/v1/chat/completions"}  # fmt: skip
    assert client_of(base_url="").url == urls[dialect]


ODD_URLS = (
    "example.org", "file:///etc/hosts", "https://", f"https://example.org/?key={KEY}", f"https://{KEY}@a.org",
    f"http://[::1/{KEY}", f"https://a.org/#{KEY}",
)  # fmt: skip


@pytest.mark.parametrize("url", ODD_URLS)
def test_an_odd_address_is_an_error_that_does_not_repeat_it(client_of, url):
    with pytest.raises(InputError, match="^base_url of a helper model: expected http") as raised:
        client_of(base_url=url)
    assert KEY not in str(raised.value)


def test_googles_request_has_the_documented_form(server, configured):
    act.GeminiClient(configured(temperature=0.5, max_new_tokens=9), ("\nUser:",))(["Grüße 😀"])
    [(path, headers, body)] = server.requests
    assert path == "/v1beta/models/a-model:generateContent" and headers["content-type"] == "application/json"
    assert body.pop("contents") == [{"role": "user", "parts": [{"text": "Grüße 😀"}]}]
    sampling = {"temperature": 0.5, "topP": 1.0, "topK": 40, "maxOutputTokens": 9, "stopSequences": ["\nUser:"]}
    assert body.pop("generationConfig") == sampling
    assert {row["threshold"] for row in body.pop("safetySettings")} == {"BLOCK_NONE"} and not body


@pytest.mark.parametrize("end", ["", "/"])
def test_openais_request_has_the_documented_form(server, configured, end):
    config = configured(temperature=0.5, max_new_tokens=9, model_id="org/a model:8b", base_url=f"{server.address}{end}")
    act.OpenAIClient(config, ("\nUser:",))(["Grüße 😀"])
    [(path, headers, body)] = server.requests
    assert path == "/chat/completions" and headers["content-type"] == "application/json"
    sampling = {"temperature": 0.5, "max_tokens": 9, "stop": ["\nUser:"]}
    assert body == {"model": "org/a model:8b", "messages": [{"role": "user", "content": "Grüße 😀"}], **sampling}


def test_an_answer_is_paid_once_in_this_process(server, client_of):
    assert client_of()(["a", "b", "a", "a"]) == [f"answer to {each}" for each in "abaa"]
    assert len(server.requests) == 2 and counts(asked=2)
    assert client_of()(["b", "a"]) == ["answer to b", "answer to a"] and counts(asked=2, cached=2)
    assert len(server.requests) == 2


def test_an_answer_is_paid_once_in_the_next_process_too(server, configured):
    act.GeminiClient(configured())(["a"])
    act.answer_cache.cache_clear()  # what a new process begins with: only the file is left
    assert act.GeminiClient(configured())(["a"]) == ["answer to a"] and len(server.requests) == 1


def test_another_model_or_another_request_is_another_answer(server, client_of):
    others = {"model_id": "another"}, {"temperature": 0.5}, {"max_new_tokens": 5}
    for changes in ({}, *others, {"concurrency": 2, "timeout": 4.0}):
        client_of(**changes)(["a"])
    assert len(server.requests) == 4, "how a call is made does not matter, what is asked does"


def test_another_server_or_dialect_gives_another_answer(server, other_server, dialect, client_of, configured):
    """Each of them may call another model by the same name."""
    end = "/v1" * (dialect == "openai")
    server.answer, other_server.answer = (lambda prompt: "from here"), (lambda prompt: "from there")
    for _ in range(2):
        assert client_of()(["a"]) == ["from here"]
        assert client_of(base_url=other_server.address + end)(["a"]) == ["from there"]
        assert client_of(base_url=server.address + end + "/")(["a"]) == ["from here"], "the same address"
    assert (len(server.requests), len(other_server.requests)) == (1, 1) and counts(asked=2, cached=4)
    server.answer = lambda prompt: "in other words"
    [other] = set(CLIENTS) - {dialect}
    assert CLIENTS[other](configured(backend=other), ("\nUser:",))(["a"]) == ["in other words"]


def test_threads_share_one_cache_file(tmp_path):
    caches = [act.AnswerCache(tmp_path / "c.sqlite") for _ in range(4)]  # as four processes would hold them
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: caches[i % 4].put(f"key {i // 4}", f"value {i // 4}"), range(80)))
    assert [caches[3].get(f"key {i}") for i in range(20)] == [f"value {i}" for i in range(20)]
    assert caches[0].get("key 20") is None


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "c.sqlite").write_text("something else" * 100)
    message = r"c\.sqlite: not usable as the cache of helper models \(file is not a database\)"
    with pytest.raises(act.HelperError, match=message):
        act.AnswerCache(tmp_path / "c.sqlite").get("key")


def test_calls_of_a_batch_go_out_together(server, configured):
    server.delay, seconds = 0.3, []
    for attempt in range(3):  # a busy machine may spoil one
        began = time.monotonic()
        assert len(act.GeminiClient(configured())([f"{attempt}/{i}" for i in range(16)])) == 16
        seconds.append(time.monotonic() - began)
        if seconds[-1] < 0.6:
            break
    assert min(seconds) < 0.6


def test_no_more_calls_are_in_flight_than_concurrency_allows(server, configured):
    now, most, lock = [0], [0], threading.Lock()

    def answer(prompt):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return "a"

    server.answer = answer
    act.GeminiClient(configured(concurrency=3))([f"{i}" for i in range(12)])
    assert 2 <= most[0] <= 3


# ----------------------------------------------------------------------------------------------------------------------
# ACT with helpers that fail, and that take their time


def a_pair(name, action=CLARIFY):
    """Asks for a year, or answers at once."""
    question, reply, answer = ("model", f"Which year of {name}?"), ("user", "2019"), ("model", f"{name} is 42")
    sides = ([question, reply, answer], [answer]) if action == CLARIFY else ([answer], [question])
    return Pair("", [("user", f"What is {name}?")], action, *sides, sides[0], answer[1])


def alone(conversation, **helpers):
    """What a conversation returns that nobody else takes part in; None where a helper has no answer."""
    try:
        wanted, request = next(conversation)
        while (answer := helpers[wanted](request)) is not None:
            wanted, request = conversation.send(answer)
    except StopIteration as end:
        return end.value


def test_a_batch_does_what_each_conversation_does_alone_also_where_helpers_fail():
    """Random worlds: what the policy, the classifier and the user say depends on the place alone."""
    seen = set()
    for seed in range(300):
        actions = [random.Random(f"{seed}/{i}").choice([CLARIFY, ANSWER]) for i in range(4)]
        pairs = [a_pair(f"{seed}.{i}", action) for i, action in enumerate(actions)]

        def draw(options, *place, seed=seed):
            return random.Random(f"{seed}/{place}").choice(options)

        def respond(pair, said):
            text = draw([pair.target, "other", pair.chosen[0][1]], pair.target, len(said)) + " " * len(said)
            return text, draw([True] * 9 + [False], pair.target, len(said), "ended")

        def classify(text):
            return draw([CLARIFY, CLARIFY, ANSWER, None], text)

        def reply(pair, said):
            return draw(["2019", "2018", None], pair.target, len(said), "user")

        def score(pair, said):
            right = float(said[-1][1].strip() == pair.target)
            return draw([(right, right)] * 5 + [None], pair.target, len(said), "judge")

        def conversations(pairs=pairs):
            return [act.act_pair(pair, 0.5, 3) for pair in pairs]

        def of_rows(one, pairs=pairs):
            return lambda rows, asked: [one(pairs[row], said) for row, said in zip(rows, asked, strict=True)]

        expected = [
            alone(conversation, respond=lambda said, pair=pair: respond(pair, said), classify=classify,
                  simulate=lambda said, pair=pair: reply(pair, said), score=lambda said, pair=pair: score(pair, said))
            for pair, conversation in zip(pairs, conversations(), strict=True)
        ]  # fmt: skip
        answers = {"respond": of_rows(respond), "classify": lambda rows, texts: list(map(classify, texts)),
                   "simulate": of_rows(reply), "score": of_rows(score)}  # fmt: skip
        assert act.in_lockstep(conversations(), answers) == expected
        seen.update(result and result[1] for result in expected)
    assert seen == {None, *act.OUTCOMES} - {act.HELPER_FAILED}


def with_policy(monkeypatch, respond):
    """respond(pair, trajectory) plays the policy, on one rank."""

    def sampler(model, template, pairs, training, noise=None):
        assert noise is None or len(noise) == len(pairs)

        def say(rows, asked):
            say.trajectories.update(zip(rows, asked, strict=True))
            return [(respond(pairs[row], said), True) for row, said in zip(rows, asked, strict=True)]

        say.trajectories = {}
        return say

    monkeypatch.setattr(act, "Sampler", sampler)
    monkeypatch.setattr(act, "all_gathered", list)
    monkeypatch.setattr(act, "unsharded", lambda *_: None)


def batch_of(monkeypatch, helpers, pairs, respond, heuristic="exact_match"):
    """`on_policy` for a batch."""
    with_policy(monkeypatch, respond)
    config = replace(Config(), data_config=act.DataConfig(heuristic=heuristic))
    run = SimpleNamespace(config=config, helpers=helpers, policy=None, template=None)
    return act.on_policy(run, pairs, 0, range(len(pairs)))[:2]


def as_gold(pair, said):
    """The policy says what the gold trajectory says."""
    return pair.gold[len(said)][1]


@pytest.mark.parametrize(
    ("actions", "replies"),
    [([None], []), ([CLARIFY], [None]), ([CLARIFY, None], ["2019"]), ([CLARIFY, CLARIFY], ["2019", None])],
)
def test_wherever_a_helper_fails_the_original_pair_stays(monkeypatch, actions, replies):
    pair, actions, replies = a_pair("x"), list(actions), list(replies)
    pair = replace(pair, gold=pair.gold + pair.gold[1:])
    classify, simulate = (lambda texts: [actions.pop(0)]), (lambda requests: [replies.pop(0)])
    helpers = act.Helpers(classify, data.rule_intents, simulate, None)
    [kept], counts_ = batch_of(monkeypatch, helpers, [pair], as_gold)
    assert kept is pair and not actions and not replies
    assert {key: number for key, number in counts_.items() if number} == {"act/helper_failed": 1}
    assert set(counts_) == {f"act/{outcome}" for outcome in act.OUTCOMES}, "rules cost nothing: no calls to count"


def helpers_of(configured, **changes):
    cast = {role: configured(**changes) for role in ROLES}
    return act.build_helpers(replace(Config(), **cast))


def as_all_helpers(prompt):
    """A well-behaved model in all roles, for the policy of the next tests."""
    if prompt.endswith("Action:"):
        return "CLARIFY" if prompt.splitlines()[-2].endswith("?") else "ANSWER"
    return {"Intent:": "The user wants 2019.", "User:": "2019"}[prompt.split()[-1]]


def test_sixteen_rollouts_take_as_long_as_their_longest_chain_of_calls(server, configured, tmp_path):
    """classify -> intent -> simulate -> classify: four calls of 0.3 s; one by one it would be 64."""
    server.delay, server.answer, seconds = 0.3, as_all_helpers, []
    pairs = [a_pair(f"x{i}") for i in range(16)]

    def respond(rows, trajectories):
        return [(as_gold(pairs[row], said), True) for row, said in zip(rows, trajectories, strict=True)]

    for attempt in range(3):  # a busy machine may spoil one
        helpers = helpers_of(configured, cache_path=str(tmp_path / f"{attempt}.sqlite"))
        began, before = time.monotonic(), len(server.requests)
        answers = {"respond": respond, **helpers.answers(pairs, "exact_match")}
        results = act.in_lockstep([act.act_pair(pair, 0.5, 3) for pair in pairs], answers)
        seconds.append(time.monotonic() - began)
        assert results == [(pair, act.GOOD_OUTCOME) for pair in pairs] and len(server.requests) - before == 64
        if seconds[-1] <= 1.25 * 1.2:
            break
    assert min(seconds) <= 1.25 * 1.2


def test_calls_of_models_are_counted_in_the_log(monkeypatch, server, configured):
    server.answer = as_all_helpers
    pairs = [a_pair("a"), a_pair("b", ANSWER)]
    found, numbers = batch_of(monkeypatch, helpers_of(configured), pairs, as_gold)
    assert found == pairs and numbers["act/good_outcome"] == 2
    helpers = {key: number for key, number in numbers.items() if key.startswith("helpers/")}
    assert helpers == {f"helpers/{key}": 5 if key == "asked" else 0 for key in act.COUNTED}
    _, numbers = batch_of(monkeypatch, helpers_of(configured), pairs, as_gold)
    assert (numbers["helpers/asked"], numbers["helpers/cached"]) == (0, 5), "of this batch, not of the whole run"


def test_a_classification_that_is_blocked_leaves_the_pair_of_its_turn_alone(monkeypatch, server, configured):
    server.answer, server.script = as_all_helpers, ["blocked prompt"]
    pairs = [a_pair(f"x{i}", ANSWER) for i in range(3)]
    helpers = helpers_of(configured, concurrency=1)
    found, numbers = batch_of(monkeypatch, helpers, pairs, lambda pair, said: f"{pair.target} or so")
    assert (numbers["act/helper_failed"], numbers["act/bad_outcome"], numbers["helpers/blocked"]) == (1, 2, 1)
    assert found[0] is pairs[0]
    assert [new.rejected for new in found[1:]] == [[("model", f"{pair.target} or so")] for pair in pairs[1:]]


def test_intents_are_summarised_once_and_only_when_a_user_is_first_asked():
    asked, simulated = [], []

    def summarize(pairs):
        asked.append([pair.target for pair in pairs])
        return [None if pair.target == "b is 42" else f"intent of {pair.target}" for pair in pairs]

    def simulate(requests):
        simulated.append(len(requests))
        return [f"{intent}, {said[-1][1]}" for _, said, intent in requests]

    pairs = [a_pair("a"), a_pair("b"), a_pair("c", ANSWER)]
    user = act.Helpers(None, summarize, simulate, None).users_of(pairs)
    said = [[("model", f"{name}?")] for name in "abc"]
    assert asked == []
    assert user([0, 1], said[:2]) == ["intent of a is 42, a?", None]
    assert user([0, 1, 2], said) == ["intent of a is 42, a?", None, "intent of c is 42, c?"]
    assert user([1], said[1:2]) == [None]
    assert asked == [["a is 42", "b is 42"], ["c is 42"]]
    assert simulated == [1, 2], "a user whose intent is not known is not asked"


def test_an_error_of_the_intents_reaches_the_rollout():
    def summarize(pairs):
        raise act.HelperError("no more")

    with pytest.raises(act.HelperError, match="no more"):
        act.Helpers(None, summarize, None, None).users_of([a_pair("a")])([0], [[("model", "q?")]])


def test_a_user_by_rule_knows_the_gold_trajectory_and_needs_no_intent(server, configured):
    """All other roles are played by a model, but nobody's intent is summarised."""
    cast = {role: configured() for role in ROLES} | {"user_simulator_config": act.HelperConfig(backend="rule")}
    helpers, pairs = act.build_helpers(replace(Config(), **cast)), [a_pair("a"), a_pair("b", ANSWER)]
    said = [[pair.gold[0]] for pair in pairs]
    assert helpers.users_of(pairs)([0, 1], said) == ["2019", data.NOTHING_TO_ADD]
    assert server.requests == []


def test_evaluated_turns_with_a_failed_helper_are_counted_and_left_out():
    pairs = [a_pair("a"), a_pair("b"), a_pair("c", ANSWER), a_pair("d", ANSWER)]
    said = [
        [pairs[0].gold[0][1], pairs[0].target],  # all right
        [pairs[1].gold[0][1]],  # the user says nothing to it
        ["wrong"],
        ["nobody knows whether this is an answer"],
    ]
    actions = {text: ANSWER for texts in said for text in texts[-1:]} | {said[0][0]: CLARIFY, said[1][0]: CLARIFY}
    actions[said[3][0]] = None

    def simulate(requests):
        return [None if pair is pairs[1] else "2019" for pair, _, _ in requests]

    def respond(rows, trajectories):
        return [(said[row][len(each) // 2], True) for row, each in zip(rows, trajectories, strict=True)]

    helpers = act.Helpers(lambda texts: [actions[text] for text in texts], data.rule_intents, simulate, None)
    answers = {"respond": respond, **helpers.answers(pairs, "exact_match")}
    played = act.in_lockstep([act.play_turn(pair, 3) for pair in pairs], answers)
    samples = [act.sample_of(pair, turn, "exact_match") for pair, turn in zip(pairs, played, strict=True)]
    assert [sample["inferred_action"] for sample in samples] == [CLARIFY, None, ANSWER, None]
    assert len({tuple(sample) for sample in samples}) == 1, "the same keys, in the same order"
    metrics = act.summarize(samples)
    assert metrics["Helper Failures"] == 2
    assert [metrics[f"{name} Turns"] for name in ("Trajectory-level", "Turn-Level", "Post-Clarification")] == [2, 2, 1]
    assert metrics["Trajectory-level Exact Match"] == 0.5 and metrics["Accuracy"] == 1.0
    assert act.summarize(samples[1:2])["Trajectory-level Exact Match"] is None


def test_gold_actions_fall_back_to_the_rule():
    helpers, texts = act.Helpers(lambda texts: [None, None, ANSWER], None, None, None), ["Who?", "He.", "Why?"]
    assert helpers.label_actions(texts) == [CLARIFY, ANSWER, ANSWER]
    classify = helpers.answers([], "drop_f1")["classify"]
    assert classify([0, 1, 2], texts) == [None, None, ANSWER], "the policy's do not"


def test_what_a_conversation_asks_for_is_answered_by_the_heuristic_that_is_set():
    answers = act.Helpers(None, None, None, None).answers([a_pair("a"), a_pair("b")], "exact_match")
    assert set(answers) == {"classify", "simulate", "score"}
    said = [[("model", "Which?"), ("user", "2019"), ("model", text)] for text in ("A IS 42", "a is 42")]
    assert answers["score"]([0], said[:1]) == [(1.0, 1.0)] and answers["score"]([0, 1], said) == [(1, 1), (0, 0)]
    drop = act.Helpers(None, None, None, None).answers([a_pair("a")], "drop_f1")["score"]
    assert drop([0], [[("model", "a is 41 and more")]]) == [data.drop_f1("a is 41 and more", "a is 42")]


# ----------------------------------------------------------------------------------------------------------------------
# The judge


def as_judge(prompt):
    """Whether the answer ends with the reference's last word; of some, nothing that can be used."""
    gold, answer = re.search(r".*\nReference: ([^\n]*)\nAnswer: ([^\n]*)\nVerdict:\Z", prompt, re.DOTALL).groups()
    if "blocked" in answer:
        return None
    if "unclear" in answer:
        return "It could be RIGHT or WRONG."
    return "**RIGHT**" if answer.split()[-1] == gold.split()[-1] else "Verdict: Wrong."


def judge_of(configured, **changes):
    """A model judges; all else is by rule."""
    return act.build_helpers(replace(Config(), judge_model_config=configured(**changes)))


@pytest.mark.parametrize("dialect", CLIENTS)
def test_a_batch_is_judged_by_a_model(monkeypatch, server, configured, dialect):
    """RIGHT wins, WRONG loses, and where there is no verdict the pair stays; only answers are judged, side by side."""
    server.answer = as_judge
    pairs = [a_pair("a"), a_pair("b"), *(a_pair(name, ANSWER) for name in "cdefg")]
    finals = ["It would be 42", "It would be 41", "That was 42", "Sorry, 41", "unclear", "blocked", "Which 42?"]
    helpers, rounds = judge_of(configured, backend=dialect), []
    assert helpers.cost
    counted = replace(helpers, judge_answers=lambda ends: rounds.append(len(ends)) or helpers.judge_answers(ends))

    def respond(pair, said):
        return pair.gold[0][1] if pair.action == CLARIFY and not said else finals[pairs.index(pair)]

    found, numbers = batch_of(monkeypatch, counted, pairs, respond, heuristic="judge")
    said = [[*pair.gold[:-1], ("model", final)] for pair, final in zip(pairs, finals, strict=True)]
    assert found[0] == replace(pairs[0], chosen=said[0]) and found[1] == replace(pairs[1], rejected=said[1])
    assert found[2] == replace(pairs[2], chosen=said[2]) and found[3] == replace(pairs[3], rejected=said[3])
    assert found[4] is pairs[4] and found[5] is pairs[5] and found[6] == replace(pairs[6], rejected=said[6])
    outcomes = {"good_outcome": 2, "bad_outcome": 2, "helper_failed": 2, "wrong_action": 1}
    calls = {"helpers/asked": 6, "helpers/blocked": 1, "helpers/unusable": 1}
    expected = {f"act/{name}": number for name, number in outcomes.items()} | calls
    assert {name: number for name, number in numbers.items() if number} == expected
    assert rounds == [4, 2], "those that answer at once together, then those that asked first"


def test_a_judge_that_gives_up_stops_the_batch(monkeypatch, server, configured):
    server.script = ["400"]
    with pytest.raises(act.RunStopped) as raised:
        batch_of(monkeypatch, judge_of(configured), [a_pair("a", ANSWER)], as_gold, heuristic="judge")
    assert line_of(raised) == FATAL["400"]


def test_evaluation_with_a_judge(monkeypatch, server, configured):
    """What it finds right is an exact match; first replies are still compared by DROP F1, turns without verdict not."""
    server.answer = as_judge
    pairs = [a_pair("a"), *(a_pair(name, ANSWER) for name in "bcd"), a_pair("e")]
    finals = ["surely 42", "b is 42", "c is 41", "unclear", None]
    with_policy(monkeypatch, lambda pair, said: finals[pairs.index(pair)] if said or pair.action == ANSWER else
                pair.gold[0][1])  # fmt: skip
    monkeypatch.setattr(act.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(act.dist, "get_world_size", lambda: 1)
    finals[4] = "Which of them?"  # asks on
    training = act.TrainingConfig(per_device_eval_batch_size=2, max_turns=2)
    config = replace(Config(), data_config=act.DataConfig(heuristic="judge"), training_config=training)
    metrics, samples = act.evaluate_pairs(None, None, pairs, judge_of(configured), config)
    assert [sample["f1"] for sample in samples] == [sample["exact_match"] for sample in samples] == [1, 1, 0, 0, 0]
    assert [sample["inferred_action"] for sample in samples] == [CLARIFY, ANSWER, ANSWER, None, CLARIFY]
    firsts = [pairs[0].gold[0][1], *finals[1:3], None, pairs[4].gold[0][1]]
    for sample, pair, first in zip(samples, pairs, firsts, strict=True):
        expected = data.drop_f1(first, pair.gold[0][1]) if first else (0.0, 0.0)
        assert (sample["turn_exact_match"], sample["turn_f1"]) == expected
    assert metrics["Helper Failures"] == 1 and metrics["Trajectory-level Turns"] == 4
    assert metrics["Trajectory-level Exact Match"] == metrics["Trajectory-level DROP F1"] == 0.5
    assert counts(asked=4, unusable=1), "who never answers is not judged"


def test_a_judge_must_be_a_model(configured):
    config = replace(Config(), policy_model_config=PolicyModelConfig("x"),
                     data_config=act.DataConfig(train_path="x", heuristic="judge"))  # fmt: skip
    with pytest.raises(InputError, match="^c.json: heuristic is 'judge', expected a judge_model_config.backend that"):
        act.check_config(config, "c.json")
    act.check_config(replace(config, judge_model_config=configured(backend="openai")), "c.json")
    assert act.build_helpers(Config()).judge_answers is None


# ----------------------------------------------------------------------------------------------------------------------
# Roles in conversation with a server

PAIR = Pair(
    "", [("user", "Who won in 2018?"), ("model", "Ada."), ("user", "How many\npoints?")], CLARIFY,
    [("model", "In which league?"), ("user", "The second."), ("model", "1,234 points")], [("model", "7")],
    [("model", "In which league?"), ("user", "The second."), ("model", "1,234 points")], "1,234 points",
)  # fmt: skip


def test_no_role_hears_the_final_answer_before_the_policy_gives_it(server, configured):
    """Summariser and user see the gold trajectory without its end, so nothing that they write can give it away."""
    server.answer = lambda prompt: "The user wants points in the second league."
    helpers = helpers_of(configured)
    assert helpers.users_of([PAIR])([0], [PAIR.gold[:1]]) == ["The user wants points in the second league."]
    assert len(server.requests) == 2 and "1,234" not in json.dumps([body for _, _, body in server.requests])


def test_questions_of_a_model_become_losing_sides(server, configured):
    server.answer = lambda prompt: "Assistant: Which year?\nUser: 2019"
    rows = data.read_vertex_jsonl(ROOT / "configs/tiny/train.jsonl")[:1]
    other = data.exchange("Who?", "Whom {do} you mean?", clarify=True) + data.exchange("Ada", "She.")
    helpers = helpers_of(configured)
    pairs = data.ACTDataset([*rows, {"messages": other}], CLARIFY, 2, helpers.write_questions).prepare_datasets()
    assert {pair.rejected[0] for pair in pairs if pair.action == ANSWER} == {("model", "Which year?")}
    prompts = [prompt_in(body) for _, _, body in server.requests]
    asking = "Assistant (asks a clarifying question):"
    assert prompts and all(prompt.endswith(f"\n{asking}") and prompt.count(asking) in (2, 3) for prompt in prompts)
    assert any(f"{asking} Whom {{do}} you mean?\n\n" in prompt for prompt in prompts)
    stops = [body["generationConfig"]["stopSequences"] for _, _, body in server.requests]
    assert {tuple(each) for each in stops} == {ROLES["preference_model_config"].stop}


def test_a_question_that_cannot_be_read_is_one_of_the_datas(server, configured):
    server.answer = lambda prompt: "I would rather not."
    pairs = data.ACTDataset([{"messages": data.exchange("a", "b?", True) + data.exchange("c", "d")}], CLARIFY, 1,
                            helpers_of(configured).write_questions).prepare_datasets()  # fmt: skip
    assert pairs[1].rejected == [("model", "b?")] and counts(asked=1, unusable=1)


def test_what_cannot_be_read_is_counted_and_becomes_nothing(server, configured):
    server.answer = lambda prompt: "Assistant: hm" if prompt.endswith("User:") else ":"
    helpers, request = helpers_of(configured), (PAIR, [a_pair("x")])
    assert helpers.classify_actions(["a", "b"]) == [None, None] and helpers.summarize_intents([PAIR]) == [None]
    assert helpers.simulate_users([(PAIR, PAIR.gold[:1], "intent")]) == [None]
    assert helpers.write_questions([request]) == [None]
    assert helpers.judge_answers([(PAIR, "7")]) == [None]
    assert counts(asked=6, unusable=6)
    server.script = ["blocked prompt"]
    assert helpers_of(configured, temperature=1.0).write_questions([request]) == [None]
    assert act.HELPER_COUNTS["blocked"] == 1 and act.HELPER_COUNTS["unusable"] == 6


# ----------------------------------------------------------------------------------------------------------------------
# A local Gemma, and who plays which role


@pytest.fixture(scope="module")
def gemma_directory(tmp_path_factory):
    """A random model with the tiny world's vocabulary and tokenizer."""
    directory = tmp_path_factory.mktemp("gemma")
    tokenizer = ROOT / "configs/tiny/tokenizer.model"
    config = GemmaConfig(
        vocab_size=len(Tokenizer(tokenizer)), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=32,
        max_position_embeddings=512, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    )  # fmt: skip
    model, generator = Gemma(config), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # the layers outweigh the embedding, lest it repeat itself
            scale = 0.1 if "embed" in name else 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale + 2.0 * ("norm" in name))
    model.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return directory


@pytest.fixture
def gemma_and_tokenizer(gemma_directory):
    return Gemma.from_pretrained(gemma_directory), Tokenizer(gemma_directory / "tokenizer.model")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_gemma_answers_each_prompt_alike_in_any_batch(gemma_and_tokenizer, temperature):
    words = ["rome", "oslo", "item", "month", "place", "which"]
    prompts = [f"get revenue {'mar ' * i}{word}" for i, word in enumerate(words)]

    def ask(prompts, batch_size):
        config = act.HelperConfig(temperature=temperature, max_new_tokens=12, batch_size=batch_size)
        return act.gemma_asker(*gemma_and_tokenizer, config)(prompts)

    answers = ask(prompts, 6)
    assert len(set(answers)) > 2, "the model tells them apart"
    assert ask(prompts, 2) == answers and ask(prompts[::-1], 4) == answers[::-1]
    assert [ask([prompt], 1)[0] for prompt in prompts] == answers
    assert ask([prompts[0], prompts[0]], 6) == [answers[0]] * 2
    assert act.HELPER_COUNTS["asked"] == 6 * 4 + 1


@pytest.mark.parametrize("end_of_turn", [True, False])
def test_gemma_is_asked_in_its_chat_template_and_long_prompts_lose_their_head(
    monkeypatch, gemma_and_tokenizer, end_of_turn
):
    (model, tokenizer), seen = gemma_and_tokenizer, []
    if not end_of_turn:
        tokenizer.end_of_turn_id = tokenizer.start_of_turn_id = None

    def generate(model, prompts, *_, stop_ids, **__):
        seen.append((prompts, stop_ids))
        return [[] for _ in prompts]

    monkeypatch.setattr(act, "generate", generate)
    ask = act.gemma_asker(model, tokenizer, act.HelperConfig(max_new_tokens=12))
    assert ask(["which", "which " * 600]) == ["", ""]
    [([short, long], stop)] = seen
    encode = tokenizer.encode
    if end_of_turn:
        user, assistant = ([4, *encode(f"{role}\n")] for role in ("user", "model"))
        assert short == [2, *user, *encode("which"), 5, *encode("\n"), *assistant] and stop == {1, 5}
    else:
        assert short == [2, *encode("which")] and stop == {1, encode("\n")[-1]}
    assert len(long) == 512 - 12


def test_a_local_helper_that_says_nothing_stops_the_run_as_a_remote_one_does(monkeypatch, gemma_and_tokenizer):
    monkeypatch.setattr(act, "generate", lambda model, prompts, *_, **__: [[] for _ in prompts])
    config = act.HelperConfig(backend="gemma", model_path="x", max_failures=3)
    monkeypatch.setattr(act, "load_helper", lambda *_: gemma_and_tokenizer)
    helpers = act.build_helpers(replace(Config(), action_model_config=config))
    assert helpers.classify_actions(["a", "b"]) == [None, None] and act.HELPER_COUNTS["unusable"] == 2
    with pytest.raises(act.HelperError, match="3 answers to action.txt in a row were of no use, like ''"):
        helpers.classify_actions(["c"])


@pytest.mark.parametrize("path", ["itself", "reference"])
def test_a_helper_whose_vocabulary_is_larger_than_its_embedding_is_refused(tmp_path, gemma_directory, path):
    """At the start: a token beyond the embedding would end a run at its first request, in any role."""
    shutil.copytree(gemma_directory, tmp_path / "model")
    config = GemmaConfig.from_json(tmp_path / "model" / "config.json")
    Gemma(replace(config, vocab_size=300)).save_pretrained(tmp_path / "model")
    policy = PolicyModelConfig(str(tmp_path / "model"))
    helper = act.HelperConfig(backend="gemma", model_path="reference" if path == "reference" else str(tmp_path / "model"))
    user = {"user_simulator_config": act.HelperConfig(backend="openai", model_id="x")}  # no rule: an intent is needed
    for role in data.ROLES:
        with pytest.raises(InputError, match="tokenizer.model: 410 pieces, expected at most the model's vocab_size 300"):
            act.build_helpers(replace(Config(), policy_model_config=policy, **{**user, role: helper}))


def test_roles_that_name_one_checkpoint_share_it(monkeypatch, gemma_directory):
    loaded, load = [], act.load_helper
    monkeypatch.setattr(act, "load_helper", lambda config, path: loaded.append(path) or load(config, path))
    local = act.HelperConfig(backend="gemma", model_path=str(gemma_directory), max_new_tokens=3)
    shared = replace(local, model_path="reference")
    config = replace(Config(), action_model_config=local, intent_model_config=local)
    config = replace(config, user_simulator_config=shared, preference_model_config=shared)
    config = replace(config, policy_model_config=PolicyModelConfig(str(gemma_directory)))
    helpers = act.build_helpers(config)
    assert loaded == [str(gemma_directory), "reference"] and helpers.cost
    assert len(helpers.classify_actions(["a", "b"])) == 2
    assert len(helpers.simulate_users([(PAIR, PAIR.gold[:1], "x")])) == 1
    assert len(act.build_helpers(replace(config, judge_model_config=shared)).judge_answers([(PAIR, "7")])) == 1


def test_a_model_id_means_gemini_and_nothing_means_rule(configured):
    fields = {}, {"model_id": "g"}, *({"backend": name, "model_id": "g"} for name in ("rule", "gemma", "openai"))
    backends = ["rule", "gemini", "rule", "gemma", "openai"]
    assert [act.backend_of(act.HelperConfig(**each)) for each in fields] == backends
    rules = act.build_helpers(Config())
    found = rules.classify_actions, rules.summarize_intents, rules.simulate_users, rules.write_questions
    assert found == (data.rule_actions, data.rule_intents, data.rule_users, data.rule_questions) and not rules.cost
    assert rules.users_of([PAIR])([0], [PAIR.gold[:1]]) == ["The second."]
    assert act.build_helpers(replace(Config(), action_model_config=configured())).cost, "one model is enough"


def test_what_models_are_told_is_among_the_files_that_must_not_change(tmp_path):
    """Also where it is the file that comes with this project; what nobody reads may change."""
    (tmp_path / "mine.txt").write_text("{response}?")
    asked = {"user_simulator_config": act.HelperConfig(backend="openai", model_id="m"),
             "action_model_config": act.HelperConfig(model_id="g", prompt_path=str(tmp_path / "mine.txt")),
             "judge_model_config": act.HelperConfig(backend="rule")}  # fmt: skip
    found = act.fingerprints(replace(Config(), **asked))
    files = {"user_simulator_config.prompt_path": ROOT / "configs/prompts/user.txt",
             "action_model_config.prompt_path": tmp_path / "mine.txt"}  # fmt: skip
    assert found.keys() == files.keys()
    assert all(found[key].endswith(hashlib.sha256(path.read_bytes()).hexdigest()) for key, path in files.items())


def test_who_makes_files_of_pairs_casts_no_user(configured):
    config = replace(Config(), task="generate_preference", **{role: configured() for role in ROLES})
    helpers = act.build_helpers(config)
    assert (helpers.summarize_intents, helpers.simulate_users) == (data.rule_intents, data.rule_users)
    assert helpers.write_questions != data.rule_questions and helpers.classify_actions != data.rule_actions


@pytest.mark.parametrize(("backend", "key"), [("gemma", "model_path"), ("gemini", "model_id"), ("openai", "model_id")])
def test_a_back_end_without_its_model_is_an_error_that_names_the_key(backend, key):
    config = replace(Config(), user_simulator_config=act.HelperConfig(backend=backend))
    with pytest.raises(InputError, match=f"^user_simulator_config.{key} is missing, backend '{backend}' needs it$"):
        act.build_helpers(config)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts of one's own


@pytest.mark.parametrize("name", ROLES)
def test_a_role_is_told_what_the_file_of_its_prompt_says(server, configured, tmp_path, name):
    """Each {name} is filled once: what stands in the texts is not looked at, and other braces stay as they are."""
    role, path = ROLES[name], tmp_path / "prompt.txt"
    path.write_text(" {{x}} {other} {" + "}\n{".join(role.names) + "}{0}\n\n", encoding="utf-8")
    helpers = act.build_helpers(replace(Config(), **{name: configured(prompt_path=str(path))}))
    odd = "{response} {conversation} {intent} {examples} {gold} {answer} {other} \\1 \\g<0>?"
    pair = Pair("", [("user", odd)], CLARIFY, *[[("model", odd), ("user", odd), ("model", "x")]] * 3, "x")
    played, request = {
        "action_model_config": (helpers.classify_actions, odd),
        "user_simulator_config": (helpers.simulate_users, (pair, [("model", odd)], odd)),
        "intent_model_config": (helpers.summarize_intents, pair),
        "preference_model_config": (helpers.write_questions, (pair, [pair])),
        "judge_model_config": (helpers.judge_answers, (pair, odd)),
    }[name]
    if name == "intent_model_config":  # cast only where the user is no rule
        played = act.build_helpers(replace(Config(), **{name: configured(prompt_path=str(path))},
                                           user_simulator_config=configured())).summarize_intents  # fmt: skip
    played([request])
    [(_, _, body)] = server.requests
    filled = role.fields(request)
    want = " {{x}} {other} " + "\n".join(filled[each] for each in role.names) + "{0}\n"
    assert prompt_in(body) == want and odd in want


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("content", [b"", b"Say something.", b"{}", b"{ response } {conversations} {Intent} {example}"])
def test_a_prompt_that_lacks_a_name_is_refused_with_its_file(configured, tmp_path, name, content):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    config = replace(Config(), user_simulator_config=configured())
    with pytest.raises(InputError) as error:
        act.build_helpers(replace(config, **{name: configured(prompt_path=str(path))}))
    assert str(error.value).startswith(f"{path}: lacks {{{ROLES[name].names[0]}}}, expected a prompt with ")


def test_a_prompt_that_is_not_there_or_not_text_is_refused(configured, tmp_path):
    for name, message in (("none.txt", "cannot be read"), ("latin.txt", "not UTF-8")):
        path = tmp_path / name
        if name == "latin.txt":
            path.write_bytes("é {response}".encode("latin-1"))
        with pytest.raises(InputError, match=f"{name}: {message}"):
            act.build_helpers(replace(Config(), action_model_config=configured(prompt_path=str(path))))


def test_shipped_prompts_are_found_from_any_directory(monkeypatch, server, configured, tmp_path):
    monkeypatch.chdir(tmp_path)
    helpers_of(configured).classify_actions(["Who?"])
    [(_, _, body)] = server.requests
    shipped = (ROOT / "configs/prompts/action.txt").read_text(encoding="utf-8")
    assert prompt_in(body) == shipped.removesuffix("\n").replace("{response}", "Who?")


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks, played by threads


def on_ranks(monkeypatch, world, work):
    """work() on `world` threads that take themselves for ranks; what each returned or raised."""
    here, barrier, lists = threading.local(), threading.Barrier(world, timeout=10), [None] * world

    def all_gathered(rows):
        lists[here.rank] = rows
        barrier.wait()
        gathered = [row for rows in lists for row in rows]
        barrier.wait()
        return gathered

    def run(rank):
        here.rank = rank
        try:
            return work(rank)
        except act.RunStopped as error:
            return error

    monkeypatch.setattr(act, "all_gathered", all_gathered)
    monkeypatch.setattr(act.dist, "get_rank", lambda: here.rank)
    monkeypatch.setattr(act.dist, "get_world_size", lambda: world)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def test_each_rank_asks_for_its_share_only_and_all_know_all_answers(monkeypatch):
    asked = []

    def answer(requests):
        asked.extend(requests)
        return [request.upper() for request in requests]

    answers = on_ranks(monkeypatch, 3, lambda rank: act.split_over_ranks("asking", answer)(list("abcdefg")))
    assert answers == [list("ABCDEFG")] * 3
    assert sorted(asked) == list("abcdefg")


def test_a_helper_that_gives_up_on_one_rank_stops_all(monkeypatch):
    def work(rank):
        if rank == 1:
            raise act.HelperError("rank 1 is refused")
        return "fine"

    errors = on_ranks(monkeypatch, 3, lambda rank: act.together(lambda: work(rank)))
    assert [str(error) for error in errors] == ["rank 1 is refused"] * 3
    assert on_ranks(monkeypatch, 3, lambda rank: act.together(lambda: rank)) == [0, 1, 2]


def test_answers_that_are_of_no_use_stop_the_run_and_a_useful_one_between_them_does_not(server, configured):
    """A model that never says what it is asked for would leave every pair as it was, and look like a run."""
    server.answer = lambda prompt: "Sure thing." if "odd" in prompt else "ANSWER"
    helpers = act.build_helpers(replace(Config(), action_model_config=configured(max_failures=3)))
    assert helpers.classify_actions(["odd 1", "odd 2", "fine", "odd 3", "odd 4"]) == [None, None, ANSWER, None, None]
    with pytest.raises(act.HelperError) as raised:
        helpers.classify_actions(["odd 5"])
    assert line_of(raised) == "3 answers to action.txt in a row were of no use, like 'Sure thing.'"


def test_without_a_cache_path_nothing_is_kept(server, configured):
    for _ in range(2):
        assert act.GeminiClient(configured(cache_path=""))(["a"]) == ["answer to a"]
    assert len(server.requests) == 2 and counts(asked=2)


def test_bad_input_that_shows_on_one_rank_stops_all(monkeypatch):
    """A gold query that fails, say: the run saves, and no rank waits for another."""

    def work(rank):
        if rank == 1:
            raise InputError("x.jsonl:7: the gold query fails")

    errors = on_ranks(monkeypatch, 3, lambda rank: act.together(lambda: work(rank)))
    assert [str(error) for error in errors] == ["x.jsonl:7: the gold query fails"] * 3


def test_a_gold_query_that_fails_is_named_by_its_line():
    helpers, pair = act.Helpers(data.rule_actions, None, data.rule_users, None), a_pair("a", ANSWER)
    pair.target, pair.where, pair.context = "SELECT b FROM t", "x.jsonl:7", "CREATE TABLE t (a)"
    with pytest.raises(InputError, match=r"^x\.jsonl:7: execution_match: the gold query 'SELECT b FROM t' fails"):
        helpers.answers([pair], "execution_match")["score"]([0], [[("model", "SELECT a FROM t")]])


def test_the_published_cast_is_gemini_in_all_four_roles():
    """Its models, temperatures and lengths; but "CLARIFY" is three tokens, where the published "Yes" is one."""
    config = act.load_config("gemma2_2b_pacific_gemini.json")
    lengths = {"action_model_config": 8, "user_simulator_config": 64, "intent_model_config": 128,
               "preference_model_config": 64}  # fmt: skip
    for name, length in lengths.items():
        cast = act.HelperConfig("gemini", model_id="gemini-2.0-flash-001", temperature=0.1, max_new_tokens=length)
        assert getattr(config, name) == cast, name
    helpers = act.build_helpers(config)
    rules = data.rule_actions, data.rule_intents, data.rule_users, data.rule_questions
    cast = helpers.classify_actions, helpers.summarize_intents, helpers.simulate_users, helpers.write_questions
    assert not set(cast) & set(rules) and helpers.cost
    plain = act.load_config("gemma2_2b_pacific.json")  # the same run otherwise
    others = {name: getattr(plain, name) for name in lengths}
    training = replace(config.training_config, output_dir=plain.training_config.output_dir)
    assert replace(config, **others, training_config=training) == plain


def test_what_a_server_says_shows_no_key_in_any_spelling_and_obeys_nothing(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk/Ab+1c")
    client = act.OpenAIClient(act.HelperConfig(backend="openai", base_url="http://localhost:1", model_id="m", cache_path=""))
    assert client.one_line("key sk/Ab+1c, sk%2FAb%2B1c, sk/\nAb +1c\x1b[31m!\x07\r\u202e.") == "key [key], [key], [key] [31m! ."
    assert client.masked("sk/Ab+1d") == "sk/Ab+1d"
