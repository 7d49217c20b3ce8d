"""Helper models: two servers' APIs played by a local one that misbehaves, a local Gemma, who plays which role."""

import email.utils
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from common import error_of, rows_of, run, run_config, run_on_ranks, start_on_ranks

import act
import data
from act import ROLES, Config, PolicyModelConfig
from data import ANSWER, CLARIFY, InputError, Pair
from gemma import Gemma, GemmaConfig, Tokenizer

ROOT = Path(__file__).parent.parent
KEY, OTHER_KEY = "AIza-not-a-real-key_0123456789", "sk-not-a-real-key_9876543210"  # Google's and OpenAI's
STOP = "\nUser:"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, one_process):
    """Both keys, waits that a test can sit out, nothing learnt from another test, and a proxy that leads nowhere.

    To this machine, where the servers of these tests are, a key never goes through a proxy.
    """
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", OTHER_KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(act, "FIRST_WAIT", 0.01)
    act.cached_answers.cache_clear()
    act.refused_by.cache_clear()


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


ECHO = "API key [KEY] is not valid.\nPass a valid one."  # some servers put the key into what they say
THOUGHT = {"text": "hm", "thought": True}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REPLIES = {  # name -> (status, headers, JSON)
    "429": (429, {}, failure_with("quota exceeded")),
    "429 with Retry-After": (429, {"Retry-After": "7"}, failure_with("quota exceeded")),
    "429 for an hour": (429, {"Retry-After": "3600"}, failure_with("quota exceeded")),
    "429 with retryDelay": (429, {}, failure_with(
        "quota exceeded", details=[{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}])),
    "429 until a date": (429, {"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}, ["not an error object"]),
    "429 until a date gone by": (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, failure_with("slow")),
    "429 until no date": (429, {"Retry-After": "Wed, 99 Oct 2037 99:28:00 +9999999"}, failure_with("slow")),
    "429 for 400 digits": (429, {"Retry-After": "9" * 400}, failure_with("quota exceeded", details="soon")),
    "500": (500, {}, failure_with("internal")),
    "503": (503, {}, "overloaded"),
    "400": (400, {}, failure_with(ECHO)),
    "400 for its length": (400, {}, failure_with("'max_tokens' and the prompt exceed the context size", param=["max_tokens"])),
    "413": (413, {}, failure_with("too large")),
    "422": (422, {}, {"detail": [{"msg": "field required"}]}),
    "401": (401, {}, failure_with("no credentials")),
    "401 in a list": (401, {}, [failure_with("no credentials")]),
    "402": (402, {}, failure_with("pay first")),
    "403": (403, {}, failure_with(ECHO)),
    "404": (404, {}, failure_with("models/nobody is not found")),
    "404 as Ollama says it": (404, {}, {"error": 'model "nobody" not found'}),
    "404 as vLLM said it": (404, {}, {"object": "error", "message": "The model `nobody` does not exist.", "code": 404}),
    "used-up quota": (429, {}, failure_with("You exceeded your current quota", code="insufficient_quota")),
    "redirect": (302, {"Location": "http://127.0.0.1:9/elsewhere"}, {}),
    "odd redirect": (302, {"Location": "http://[::1/elsewhere"}, {}),
    "list": (200, {}, []),
    "empty object": (200, {}, {}),
    "200 with an error": (200, {}, failure_with("Rate limit exceeded", code=429)),
    "200 with an error in words": (200, {}, {"error": "the model crashed"}),
    "200 with a refusal": (200, {}, failure_with("bad prompt", code=400)),
    "200 without credit": (200, {}, failure_with("Insufficient credits", code=402)),
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
        "a list of parts": openai_reply([{"type": "thinking", "thinking": [{"text": "hm"}]},
                                         {"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]),
        "a list of texts": openai_reply(["hi"]),
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
        "eos_token": openai_reply("another maker's word for its end", "eos_token"),
        "an error in the choice": {"choices": [{"error": {"code": 502, "message": "Provider returned error"},
                                                "message": {"role": "assistant", "content": ""}}]},
        "null for finish_reason": openai_reply("as old servers say it", None),
        "reasoning": openai_reply("done", reasoning_content="hm"),
        "null and reasoning": openai_reply(None, "length", reasoning_content="hm"),
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
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        dialect = "gemini" if self.path.endswith(":generateContent") else "openai"
        self.key = headers.get("x-goog-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        with self.server.lock:
            self.server.requests.append((self.path, headers, body))
            behaviour = self.server.script.pop(0) if self.server.script else self.server.always
        time.sleep(self.server.delay)
        reply_with = gemini_reply if dialect == "gemini" else openai_reply
        if behaviour == "good":
            text = self.server.answer(prompt_in(body))  # None: as `instead` says
            behaviour = behaviour if text else self.server.instead
        if behaviour == "hang":
            self.server.over.wait(20)
        elif behaviour == "reset":  # closed with a reset instead of an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        elif behaviour == "hang up":
            self.close_connection = True
        elif behaviour == "half an answer":
            self.send(200, {"Content-Length": "1000"}, json.dumps(reply_with("half")).encode()[:-9])
        elif behaviour == "invalid JSON":
            self.send(200, {}, b'{"candidates": [{"content": ')
        elif behaviour == "stream":
            lines = [{"choices": [{"delta": {"content": "hi"}}]}, "[DONE]"]
            self.send(200, {}, "".join(f"data: {json.dumps(line)}\n\n" for line in lines).encode())
        elif behaviour == "early hints":
            self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n")
            self.send(200, {}, json.dumps(reply_with("after all")).encode())
        elif isinstance(behaviour, dict):  # parameters that are refused, with what is said about them
            named = next((name for name in behaviour if name in body), None)
            reply = failure_with(behaviour[named], param=named) if named else reply_with("at last")
            status = 422 if named == "temperature" else 400
            self.send(status if named else 200, {}, json.dumps(reply).encode())
        elif behaviour == "not UTF-8":
            self.send(200, {}, json.dumps(reply_with("half")).encode("utf-16")[:-1])
        elif behaviour == "not HTTP":
            self.wfile.write(f"{self.key} to you too\r\n\r\n".encode())
        elif behaviour in POURED:
            status, headers, piece, times = POURED[behaviour]
            self.send(status, headers, b"") if status else self.wfile.write(headers)
            self.pour(piece, times)
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
    server.requests, server.script, server.always = [], [], "good"
    server.delay, server.poured, server.instead = 0.0, 0, "blocked prompt"
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
        fields = {"model_id": "a-model", "base_url": address, "cache_path": str(tmp_path / "cache.jsonl")}
        return act.HelperConfig(**{**fields, "timeout": 5.0, **changes})

    return make


@pytest.fixture(params=act.DIALECTS)
def dialect(request):
    return request.param


def as_it_is(answer):
    """A role's reading of an answer that finds all of them useful."""
    return answer


class Asked(act.Client):
    """What asks a server: prompts in, answers out, None for one that failed, and why it did."""

    why = ""

    def __call__(self, prompts):
        answers = super().__call__(prompts)
        failed = [answer for answer in answers if isinstance(answer, act.CallFailed)]
        self.why = str(failed[-1]) if failed else self.why
        return [None if answer in failed else answer for answer in answers]


def client(config, understood=as_it_is):
    """What asks the server of this configuration."""
    return Asked(config, act.DIALECTS[act.backend_of(config)], STOP, understood)


@pytest.fixture
def client_of(dialect, configured):
    """A client that speaks to the server in this dialect."""
    return lambda understood=as_it_is, **changes: client(configured(backend=dialect, **changes), understood)


def in_each(names):
    """Parameters (dialect, behaviour) from {dialect: names of behaviours}."""
    cases = [(dialect, name) for dialect, of_dialect in names.items() for name in of_dialect]
    return pytest.mark.parametrize(("dialect", "behaviour"), cases, indirect=["dialect"])


def line_of(raised):
    text = str(raised.value)
    assert "\n" not in text and len(text) < 500 and KEY not in text and OTHER_KEY not in text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# What each misbehaviour leads to

AGAIN = (
    "429", "429 until a date", "429 until no date", "429 for 400 digits", "500", "503", "reset", "hang up", "hang",
    "half an answer", "invalid JSON", "not UTF-8", "not HTTP", "list", "200 with an error",
    "200 with an error in words",
)  # fmt: skip
AGAIN = {
    "gemini": (*AGAIN, "null for a text"),
    "openai": (*AGAIN, "an error in the choice", "null for choices", "a text in place of a message", "a list of texts", "a number for content"),
}  # fmt: skip
ALONE = {  # this prompt has no answer, others may
    **dict.fromkeys(("400", "400 for its length", "413", "422", "stream", "200 with a refusal")),
}
EMPTY = {
    "gemini": (
        *ALONE, "no candidates", "odd candidates", "empty object", "blocked prompt", "SAFETY", "RECITATION", "empty text", "blank text",
        "all thought", "key in the reason",
    ),
    "openai": (
        *ALONE, "no choices", "odd choices", "empty object", "no message", "blocked prompt", "refusal", "tool calls",
        "tool calls that claim to stop", "all reasoning", "empty text", "blank text", "key in the reason",
        "null and reasoning",
    ),
}  # fmt: skip
ANSWERED = {
    "gemini": {"MAX_TOKENS": "cut off", "parts": "two parts"},
    "openai": {
        "length": "cut off", "null for finish_reason": "as old servers say it", "reasoning": "done",
        "no finish_reason": "bare", "eos_token": "another maker's word for its end", "a list of parts": "two parts",
    },
}  # fmt: skip
for of_dialect in ANSWERED.values():
    of_dialect.update({"half a character": "odd ? end", "key in the answer": "your key is [key]"})
    of_dialect.update({"early hints": "after all"})
FATAL = {  # what no call can get around: the server's words
    "401": "HTTP 401: no credentials",
    "401 in a list": "HTTP 401: [{'error': {'message': 'no credentials'}}]",
    "402": "HTTP 402: pay first",
    "403": "HTTP 403: API key [key] is not valid. Pass a valid one.",
    "404": "HTTP 404: models/nobody is not found",
    "404 as Ollama says it": 'HTTP 404: model "nobody" not found',
    "404 as vLLM said it": "HTTP 404: The model `nobody` does not exist.",
    "used-up quota": "HTTP 429: You exceeded your current quota",
    "200 without credit": "HTTP 200: Insufficient credits",
    **dict.fromkeys(("redirect", "odd redirect"), "HTTP 302: Found"),
}
WHY = {  # behaviour -> what is said of the call that had no answer
    "stream": "its reply is streamed, expected one JSON object",
    "200 with an error": "HTTP 200: Rate limit exceeded",
    "an error in the choice": "HTTP 200: Provider returned error",
    "400": "HTTP 400: API key [key] is not valid. Pass a valid one.",
    "422": "HTTP 422: {'detail': [{'msg': 'field required'}]}",
    **dict.fromkeys(
        ("tool calls", "all thought", "all reasoning", "null and reasoning", "SAFETY", "RECITATION"),
        "no text (max_new_tokens 128) in {'",  # and the reply itself, which says why
    ),
    "invalid JSON": "its reply is not the JSON of an answer",
    "half an answer": "its reply is not the JSON of an answer",
}


@in_each(AGAIN)
def test_what_may_pass_is_tried_again(monkeypatch, server, client_of, behaviour):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    server.script = [behaviour]
    ask = client_of(timeout=0.25 if behaviour == "hang" else 5.0)
    assert ask(["p"]) == ["answer to p"] and len(server.requests) == 2


@in_each(AGAIN)
def test_what_does_not_pass_is_given_up_and_not_stored(monkeypatch, server, client_of, behaviour):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    server.script = [behaviour] * 3
    ask = client_of(timeout=0.1 if behaviour == "hang" else 5.0, max_retries=2)
    assert ask(["p"]) == [None] and len(server.requests) == 3
    assert ask.why.startswith(WHY.get(behaviour, ask.why))
    assert client_of()(["p"]) == ["answer to p"], "it was not taken for an answer"


def test_a_server_that_is_gone_for_a_while_is_tried_again(monkeypatch, server, client_of):
    """A server that is started anew in the night must not end the run."""
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        ask = client_of(base_url=f"http://127.0.0.1:{closed.getsockname()[1]}", max_retries=2)
        waits = []
        monkeypatch.setattr(ask.spent, "wait", waits.append)
        assert ask(["p"]) == [None] and len(waits) == 3 and "Connection refused" in ask.why


@in_each(EMPTY)
def test_a_prompt_without_an_answer_fails_alone_at_once_and_is_not_stored(server, client_of, behaviour):
    server.script = [behaviour]
    ask = client_of(concurrency=1)
    assert ask(["p", "q"]) == [None, "answer to q"] and len(server.requests) == 2
    assert ask.why.startswith(WHY.get(behaviour, ask.why))
    assert ask(["p"]) == ["answer to p"]


@in_each(ANSWERED)
def test_unusual_answers_are_answers(server, client_of, dialect, behaviour):
    server.script = [behaviour]
    assert client_of()(["p"]) == [ANSWERED[dialect][behaviour]] and len(server.requests) == 1


@pytest.mark.parametrize("behaviour", FATAL)
def test_what_refuses_all_calls_stops_the_run_at_once_with_the_servers_words(server, client_of, behaviour):
    server.script = [behaviour] * 3
    with pytest.raises(act.RunStopped) as raised:
        client_of(concurrency=1)(["p", "q", "r"])
    assert line_of(raised) == f"a-model: {FATAL[behaviour]}" and len(server.requests) == 1


@pytest.mark.parametrize(
    ("behaviour", "waits"),
    [
        ("500", [1, 2, 4, 8, 16, 32, 60, 60]),
        ("429 with retryDelay", [8, 9, 11, 15, 23, 39, 60, 60]),
        ("429 with Retry-After", [8, 9, 11, 15, 23, 39, 60, 60]),
        ("429 for an hour", [60] * 8),
        ("429 until a date", [60] * 8),
        ("429 until a date gone by", [4, 8, 16, 32, 60, 60, 60, 60]),
        ("429 until no date", [4, 8, 16, 32, 60, 60, 60, 60]),
        ("429 for 400 digits", [60] * 8),
    ],
)
def test_waits_double_and_begin_when_the_server_says_so(monkeypatch, server, client_of, behaviour, waits):
    """The jitter is drawn from 0 up to the doubling wait; here it is always at its upper end."""
    drawn, waited = [], []
    monkeypatch.setattr(act, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: drawn.append((low, high)) or high)
    server.script = [behaviour] * 8
    ask = client_of(max_retries=8)
    ask.spent.wait = waited.append
    assert ask(["p"]) == ["answer to p"]
    quota = 4 if waits[0] == 4 else 1  # of a minute, say, where the server names no time
    assert waited == [0, *waits] and drawn == [(0, quota * 2**i) for i in range(8)]


def test_a_date_says_how_long_to_wait():
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < act.retry_after(soon) <= 30


def test_after_the_stop_nothing_waits_for_calls_that_would_be_tried_again(monkeypatch, server, client_of):
    monkeypatch.setattr(act, "FIRST_WAIT", 30.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    server.script = ["503"] * 7 + ["401"]
    began = time.monotonic()
    with pytest.raises(act.RunStopped):
        client_of(concurrency=8)([f"{i}" for i in range(8)])
    assert time.monotonic() - began < 5


def test_a_run_that_is_asked_to_stop_waits_for_no_call_in_flight_nor_tries_one_again(monkeypatch, server, client_of):
    """Ctrl-C or SIGTERM while a helper hangs."""
    monkeypatch.setattr(act, "ASKED", [])
    monkeypatch.setattr(act, "FIRST_WAIT", 30.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    server.script = ["503", "hang"]
    threading.Timer(0.3, act.ASKED.append, [15]).start()
    began, before = time.monotonic(), set(threading.enumerate())
    with pytest.raises(act.RunStopped, match="^interrupted$"):
        client_of(concurrency=2)(["p", "q", "r"])
    assert time.monotonic() - began < 4
    server.over.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert len(server.requests) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Parameters that a server does not take


@pytest.mark.parametrize(("refused", "sent"), [
    ({"max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."},
     {"temperature", "stop", "max_completion_tokens"}),
    ({"temperature": "Only the default (1) value is supported."}, {"max_tokens", "stop"}),
    ({"stop": "'stop' is not supported with this model."}, {"max_tokens", "temperature"}),
    ({"max_tokens": "no max_tokens", "temperature": "no temperature", "stop": "no stop"}, {"max_completion_tokens"}),
])  # fmt: skip
def test_a_parameter_that_a_server_refuses_is_renamed_or_dropped_once_and_that_is_said(
    server, configured, capsys, refused, sent
):
    server.always = refused
    config = configured(backend="openai", max_new_tokens=9, concurrency=1)
    assert client(config)(["p", "q"]) == ["at last"] * 2
    assert len(server.requests) == len(refused) + 2, "one more call for each"
    assert client(replace(config, concurrency=2))(["r", "p"]) == ["at last"] * 2
    assert len(server.requests) == len(refused) + 3, "another role knows, and the cache asks no more"
    assert {*server.requests[-1][2]} == {"model", "messages", *sent}
    assert server.requests[-1][2].get("max_completion_tokens", 9) == 9
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(refused)
    for name in refused:
        line = f"{server.address}/v1/chat/completions: going on without {name} (HTTP {422 if name == 'temperature' else 400}: {refused[name]}"
        assert any(each.startswith(line) for each in said)


def test_a_word_in_place_of_a_key_is_not_looked_for_in_replies(monkeypatch, server, configured):
    """What people give a server that asks for none."""
    monkeypatch.setenv("OPENAI_API_KEY", "answer")
    assert client(configured(backend="openai"))(["p"]) == ["answer to p"]


def test_calls_in_flight_that_are_refused_the_same_say_it_once(server, configured, capsys):
    server.always, server.delay = {"stop": "no stop"}, 0.1
    assert client(configured(backend="openai", concurrency=8))(list("abcdefgh")) == ["at last"] * 8
    assert len(server.requests) > 9 and len(capsys.readouterr().out.splitlines()) == 1


def test_a_parameter_is_dropped_for_a_400_alone_and_not_for_a_prompt_that_is_too_long(server, configured, capsys):
    server.script = ["400 for its length", "422", "400"]
    assert client(configured(backend="openai", concurrency=1))(["a", "b", "c", "d"]) == [None] * 3 + ["answer to d"]
    assert capsys.readouterr().out == "" and {*server.requests[-1][2]} >= {"max_tokens", "temperature", "stop"}


def test_a_parameter_that_is_refused_by_every_name_fails(server, configured):
    server.always = {"max_tokens": "no max_tokens", "max_completion_tokens": "no max_completion_tokens either"}
    ask = client(configured(backend="openai"))
    assert ask(["p"]) == [None] and len(server.requests) == 2 and "either" in ask.why


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


@pytest.mark.parametrize("behaviour", [*POURED, *DRIPPED])
def test_a_reply_without_bounds_is_a_failed_call(server, client_of, behaviour):
    """No thread is left for which the process would wait."""
    server.script, before = [behaviour], set(threading.enumerate())
    ask = client_of(timeout=5.0 if behaviour in POURED else 0.1, max_retries=0)
    assert in_time(lambda: ask(["p"])) == [None] and ask.why
    assert len(server.requests) == 1 and not ask.cached
    assert server.poured < 20_000_000, "what is read is bounded, and so is what is kept of it"
    deadline = time.monotonic() + 2
    while any(not thread.daemon for thread in set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(thread.daemon for thread in set(threading.enumerate()) - before), "the process could not end"


def test_answers_up_to_the_bound_are_read_whole(server, client_of):
    server.answer = lambda prompt: "é" * 600_000  # 3.6 MB of JSON
    assert client_of()(["p"]) == ["é" * 600_000]
    server.answer = lambda prompt: "é" * 700_000
    assert client_of(max_retries=0)(["q"]) == [None]


# ----------------------------------------------------------------------------------------------------------------------
# The keys, the requests, the cache, concurrency


def test_the_key_is_nowhere_but_in_its_header(monkeypatch, server, client_of, dialect, tmp_path, capfd, caplog):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    key, header = {"gemini": (KEY, ("x-goog-api-key", KEY)),
                   "openai": (OTHER_KEY, ("authorization", f"Bearer {OTHER_KEY}"))}[dialect]  # fmt: skip
    server.script = ["key in the answer", "key in the reason", "not HTTP", "good", "good", "400", "403"]
    ask = client_of(concurrency=1, max_retries=1)
    for prompt in "abcde":
        assert key not in repr(ask([prompt])) + ask.why
    with pytest.raises(act.RunStopped) as raised:
        ask(["f"])
    error = raised.value
    while error:
        assert key not in "".join(traceback.format_exception(error)) + repr(error.args)
        error = error.__cause__ or error.__context__
    for path, headers, body in server.requests:
        assert headers.pop(header[0]) == header[1] and key not in path + json.dumps([headers, body])
    assert all(key.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert (tmp_path / "cache.jsonl").stat().st_size > 0
    said = capfd.readouterr()
    assert key not in said.out + said.err + caplog.text


COMMON_HEADERS = {"accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}


def test_nothing_of_one_dialect_is_in_a_request_of_the_other(server, configured):
    for dialect in ("gemini", "openai"):
        assert client(configured(backend=dialect))([dialect]) == [f"answer to {dialect}"]
    google, openai = server.requests
    assert set(google[1]) == {*COMMON_HEADERS, "x-goog-api-key"} and OTHER_KEY not in json.dumps(google)
    assert set(google[2]) == {"contents", "generationConfig", "safetySettings"}
    assert set(openai[1]) == {*COMMON_HEADERS, "authorization"} and KEY not in json.dumps(openai)
    assert set(openai[2]) == {"model", "messages", "temperature", "max_tokens", "stop"}
    assert not re.search("(?i)goog|gemini", json.dumps([openai[0], *openai[1].items(), {**openai[2], "messages": 0}]))


ODD_KEYS = "two words", "line\nbreak", "schlüssel"
HOMES = {"gemini": "https://generativelanguage.googleapis.com", "openai": "https://api.openai.com/v1"}


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
    with pytest.raises(InputError, match=f"^{name} .*'a-model' at http") as raised:
        client_of(**changes)
    assert local or str(raised.value).endswith(HOMES[dialect]), "it says where the conversations would go"
    assert not key or not key.strip() or key not in str(raised.value)
    assert server.requests == []


def test_where_no_address_is_given_the_key_goes_to_whom_it_belongs(client_of, dialect):
    ends = {"gemini": "/v1beta/models/a-model:generateContent", "openai": "/chat/completions"}
    assert client_of(base_url="").url == HOMES[dialect] + ends[dialect]


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
    client(configured(temperature=0.5, max_new_tokens=9))(["Grüße 😀"])
    [(path, headers, body)] = server.requests
    assert path == "/v1beta/models/a-model:generateContent" and headers["content-type"] == "application/json"
    assert body.pop("contents") == [{"role": "user", "parts": [{"text": "Grüße 😀"}]}]
    sampling = {"temperature": 0.5, "topP": 1.0, "topK": 40, "maxOutputTokens": 9, "stopSequences": ["\nUser:"]}
    assert body.pop("generationConfig") == sampling
    assert {row["threshold"] for row in body.pop("safetySettings")} == {"BLOCK_NONE"} and not body


@pytest.mark.parametrize("end", ["", "/"])
def test_openais_request_has_the_documented_form(server, configured, end):
    config = configured(backend="openai", temperature=0.5, max_new_tokens=9, model_id="org/a model:8b",
                        base_url=f"{server.address}{end}")  # fmt: skip
    client(config)(["Grüße 😀"])
    [(path, headers, body)] = server.requests
    assert path == "/chat/completions" and headers["content-type"] == "application/json"
    sampling = {"temperature": 0.5, "max_tokens": 9, "stop": ["\nUser:"]}
    assert body == {"model": "org/a model:8b", "messages": [{"role": "user", "content": "Grüße 😀"}], **sampling}


def test_an_answer_is_paid_once_in_this_process(server, client_of):
    assert client_of()(["a", "b"]) == ["answer to a", "answer to b"]
    assert client_of()(["b", "a"]) == ["answer to b", "answer to a"] and len(server.requests) == 2


def test_an_answer_is_paid_once_in_the_next_process_too(server, configured):
    server.answer = lambda prompt: "Grüße\n\u2028 \u0085\x1c"
    client(configured())(["a"])
    act.cached_answers.cache_clear()  # what a new process begins with: only the file is left
    assert client(configured())(["a"]) == ["Grüße\n\u2028 \u0085\x1c"] and len(server.requests) == 1


def test_only_an_answer_that_can_be_used_is_kept(server, client_of):
    """A server that is mended is asked again."""
    server.answer = lambda prompt: "<think>hm"
    assert client_of(act.without_reasoning)(["a"]) == ["<think>hm"]
    server.answer = lambda prompt: "fine"
    for _ in range(2):
        assert client_of(act.without_reasoning)(["a"]) == ["fine"] and len(server.requests) == 2


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
    assert (len(server.requests), len(other_server.requests)) == (1, 1)
    server.answer = lambda prompt: "in other words"
    [other] = set(act.DIALECTS) - {dialect}
    assert client(configured(backend=other))(["a"]) == ["in other words"]


def test_threads_and_processes_add_to_one_cache_file(server, configured):
    """Four clients as four processes would have them, each with its own view of the file."""
    clients = []
    for _ in range(4):
        act.cached_answers.cache_clear()
        clients.append(client(configured(concurrency=8)))
    prompts = [[f"{i} {letter}" for i in range(20)] for letter in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: clients[i](prompts[i]), range(4)))
    act.cached_answers.cache_clear()
    found = client(configured())
    assert [found(each) for each in prompts] == [[f"answer to {prompt}" for prompt in each] for each in prompts]
    assert len(server.requests) == 80


def test_half_a_line_at_the_end_of_a_cache_costs_that_answer(tmp_path):
    """A run that is killed leaves it; the next goes on behind it, and the one after that still reads the rest."""

    def lines(*names):
        return "".join(json.dumps([hashlib.sha256(name.encode()).hexdigest(), f"{name} is it"]) + "\n" for name in names)

    def found(raw):
        path.write_bytes(raw)
        act.cached_answers.cache_clear()
        return sorted(act.cached_answers(path).values())

    path, whole = tmp_path / "c.jsonl", lines("a", "sécond").encode()
    assert found(whole) == ["a is it", "sécond is it"]
    for end in range(len(lines("a")) + 1, len(whole) - 1):
        assert found(whole[:end]) == ["a is it"]
        assert found(whole[:end] + lines("third", "fourth").encode()) == ["a is it", "fourth is it"]
    for end in (2, 10, 40, 66, 70):
        assert found(whole[:end]) == [], "killed in its first answer"


@pytest.mark.parametrize("content", [
    b"something else" * 100, b'{"step": 1, "loss": 2}\n', b'{"a": "x", "b": "y"}\n', b"[1, 2]\n", b'["a", "b"]\n', b'"ab"\n',
    b"SQLite format 3\0\xff\xfe", b"[" * 100_000, b'["some", "list", "of lists"]\n["more"]',
])  # fmt: skip
def test_a_file_that_is_no_cache_is_refused_and_left_as_it_is(server, configured, tmp_path, content):
    (tmp_path / "cache.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"cache\.jsonl: not a cache of helper models' answers"):
        client(configured())
    assert (tmp_path / "cache.jsonl").read_bytes() == content


def test_only_texts_of_a_cache_are_answers(server, configured, tmp_path):
    keys = [digit * 64 for digit in "abcd"]
    rows = zip(keys, ["ok", 5, None, ["x"]], strict=True)
    (tmp_path / "cache.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert act.cached_answers(str(tmp_path / "cache.jsonl")) == {keys[0]: "ok"}


def test_a_cache_that_cannot_be_written_stops_the_run_which_saves(server, configured, tmp_path):
    ask = client(configured(cache_path=str(tmp_path / "nowhere" / "cache.jsonl")))
    with pytest.raises(act.RunStopped, match=r"cache\.jsonl: cannot be written \(No such file or directory\)"):
        ask(["a"])


def test_without_a_cache_path_nothing_is_kept(server, configured):
    for _ in range(2):
        assert client(configured(cache_path=""))(["a"]) == ["answer to a"]
    assert len(server.requests) == 2


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
    client(configured(concurrency=3))([f"{i}" for i in range(12)])
    assert 2 <= most[0] <= 3


def test_what_a_server_says_is_one_line_that_no_terminal_obeys():
    failure = act.CallFailed("HTTP 400: sk-1d\x1b[31m!\x07\r\n\u202e. Grüße")
    assert str(failure) == r"HTTP 400: sk-1d\x1b[31m!\x07 \u202e. Grüße"
    assert len(str(act.CallFailed("word " * 1000))) == 300


# ----------------------------------------------------------------------------------------------------------------------
# At the start of a run


def helpers_of(config):
    """The helpers of a configuration, as a run builds them."""
    files = {key: path for key, path in act.input_files(config).items() if key.endswith("prompt_path")}
    return act.Helpers(config, {key: data.read_bytes(path) for key, path in files.items()})


def cast(configured, *roles, **changes):
    """A configuration in which a model on the server plays these roles, or all."""
    return replace(Config(), **{role: configured(**changes) for role in roles or ROLES})


def asked(server):
    """What the server was asked after the start."""
    return [prompt for prompt in (prompt_in(body) for *_, body in server.requests) if prompt != "Say yes."]


def test_three_flags_cast_all_roles():
    flags = {"helper_config.backend": "openai", "helper_config.base_url": "http://localhost:1/v1", "helper_config.model_id": "m"}
    config = act.load_config("tiny.json", flags)
    for role in ROLES:
        assert getattr(config, role) == act.HelperConfig("openai", base_url="http://localhost:1/v1", model_id="m"), role
    own = {"user_simulator_config.model_id": "other", "judge_model_config.backend": "rule"}
    config = act.load_config("tiny.json", flags | own)
    assert config.user_simulator_config.model_id == "other" and config.user_simulator_config.backend == "openai"
    assert act.backend_of(config.judge_model_config) == "rule" and config.action_model_config.model_id == "m"


def test_a_server_is_asked_once_before_a_run_begins_whatever_roles_it_plays(server, configured, capsys):
    helpers_of(cast(configured, backend="openai"))
    assert [prompt_in(body) for *_, body in server.requests] == ["Say yes."]
    assert capsys.readouterr().out == f"helper model a-model: conversations go to {server.address}/v1/chat/completions\n"


def flags_for(server, *words):
    """Three flags, and no cache."""
    return ("--helper_config.backend", "openai", "--helper_config.base_url", f"{server.address}/v1", "--helper_config.model_id", "m",
            "--helper_config.cache_path", "", *words)  # fmt: skip


@pytest.mark.parametrize(("base_url", "said"), [
    ("http://127.0.0.1:9/v1", "Connection refused"), ("http://no.such.host.invalid/v1", "not known|resolution|Errno"),
    ("https://127.0.0.1:{port}/v1", "SSL|TLS"),
])  # fmt: skip
def test_a_wrong_address_is_one_line_within_seconds(monkeypatch, server, world, tmp_path, capsys, base_url, said):
    monkeypatch.delenv("http_proxy")
    url, began = base_url.format(port=server.server_port), time.monotonic()
    words = flags_for(server, "--helper_config.base_url", url)
    line = error_of(capsys, "--config", run_config(world, tmp_path), *words)
    assert time.monotonic() - began < 8 and f"{url}/chat/completions: " in line and re.search(said, line)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("behaviour", ["401", "404", "used-up quota", "400", "invalid JSON"])
def test_a_missing_key_or_model_or_quota_is_one_line_at_the_start(server, world, tmp_path, capsys, behaviour):
    server.always = behaviour
    line = error_of(capsys, "--config", run_config(world, tmp_path), *flags_for(server))
    said = {**FATAL, **WHY}[behaviour]
    assert line == f"act.py: error: {server.address}/v1/chat/completions: {said}\n" and len(server.requests) == 1


@pytest.mark.parametrize("behaviour", ["503", "429 with Retry-After", "blocked prompt", "hang", "413"])
def test_a_server_that_only_has_no_answer_yet_does_not_keep_a_run_from_beginning(monkeypatch, server, configured, behaviour):
    monkeypatch.setattr(act, "FIRST_TIMEOUT", 0.2)
    server.script = [behaviour]
    helpers = helpers_of(cast(configured, "action_model_config"))
    server.answer = lambda prompt: "ANSWER"
    assert helpers.roles["action_model_config"](["x"]) == [ANSWER]


def test_chats_go_to_a_default_host_only_with_its_key(monkeypatch, world, tmp_path, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    words = "--helper_config.backend", "openai", "--helper_config.model_id", "m"
    line = error_of(capsys, "--config", run_config(world, tmp_path), *words)
    assert "OPENAI_API_KEY is not set, or has " in line
    assert "expected the key for helper model 'm' at https://api.openai.com/v1" in line


# ----------------------------------------------------------------------------------------------------------------------
# ACT with helpers that fail, and that take their time


def a_pair(name, action=CLARIFY):
    """Asks for a year, or answers at once."""
    question, reply, answer = ("model", f"Which year of {name}?"), ("user", "2019"), ("model", f"{name} is 42")
    sides = ([question, reply, answer], [answer]) if action == CLARIFY else ([answer], [question])
    return Pair("", [("user", f"What is {name}?")], action, *sides, sides[0], answer[1])


def alone(conversation, **helpers):
    """What a conversation returns that nobody else takes part in."""
    try:
        wanted, request = next(conversation)
        while True:
            answer = helpers[wanted](request)
            move = conversation.throw(act.HelperFailed()) if answer is None else conversation.send(answer)
            wanted, request = move
    except StopIteration as end:
        return end.value


def test_a_batch_does_what_each_conversation_does_alone_also_where_helpers_fail():
    """Random worlds: what the policy, the classifier and the user say depends on the place alone."""
    seen = set()
    for seed in range(200):
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
        seen.update(rollout.outcome for rollout in expected)
    assert seen == {*act.OUTCOMES}


def respond_by(policy, pairs):
    """`respond` of a driver: policy(pair, trajectory) says each row's next message."""

    def respond(rows, trajectories):
        return [(policy(pairs[row], said), True) for row, said in zip(rows, trajectories, strict=True)]

    return respond


def rollouts_of(helpers, pairs, policy, heuristic="exact_match"):
    """Algorithm 2 for a batch, the policy by script."""
    answers = {"respond": respond_by(policy, pairs), **helpers.answers(pairs, heuristic)}
    return act.in_lockstep([act.act_pair(pair, 0.5, 3) for pair in pairs], answers)


def as_gold(pair, said):
    """The policy says what the gold trajectory says."""
    return pair.gold[len(said)][1]


def helpers_by(**roles):
    """Helpers by rule, but for these roles: functions from requests to results."""
    helpers = act.Helpers(Config(), {})
    helpers.roles |= {f"{name}_config": role for name, role in roles.items()}
    return helpers


@pytest.mark.parametrize(
    ("actions", "replies"),
    [([None], []), ([CLARIFY], [None]), ([CLARIFY, None], ["2019"]), ([CLARIFY, CLARIFY], ["2019", None])],
)
def test_wherever_a_helper_fails_the_original_pair_stays(actions, replies):
    pair, actions, replies = a_pair("x"), list(actions), list(replies)
    pair = replace(pair, gold=pair.gold + pair.gold[1:])
    helpers = helpers_by(action_model=lambda texts: [actions.pop(0)], user_simulator=lambda requests: [replies.pop(0)])
    [rollout] = rollouts_of(helpers, [pair], as_gold)
    assert rollout.pair is pair and not actions and not replies
    assert (rollout.outcome, rollout.replaced, rollout.score) == (act.HELPER_FAILED, None, None)


def as_all_helpers(prompt):
    """A well-behaved model in all roles."""
    if prompt.endswith("Action:"):
        return "CLARIFY" if prompt.splitlines()[-2].endswith("?") else "ANSWER"
    ends = {"Intent:": "The user wants 2019.", "User:": "2019", "question):": "Which year?", "Verdict:": "RIGHT", "yes.": "Yes."}
    return ends[prompt.split()[-1]]


def test_sixteen_rollouts_take_as_long_as_their_longest_chain_of_calls(server, configured, tmp_path):
    """classify -> intent -> simulate -> classify: four calls of 0.15 s; one by one it would be 64."""
    server.answer, seconds = as_all_helpers, []
    pairs = [a_pair(f"x{i}") for i in range(16)]
    for attempt in range(3):  # a busy machine may spoil one
        server.delay = 0.0
        helpers = helpers_of(cast(configured, cache_path=str(tmp_path / f"{attempt}.jsonl")))
        server.delay, before, began = 0.15, len(server.requests), time.monotonic()
        rollouts = rollouts_of(helpers, pairs, as_gold)
        seconds.append(time.monotonic() - began)
        assert [rollout.outcome for rollout in rollouts] == [act.GOOD_OUTCOME] * 16
        assert len(server.requests) - before == 64
        if seconds[-1] <= 0.15 * 8:
            break
    assert min(seconds) <= 0.15 * 8


def test_a_classification_that_is_blocked_leaves_the_pair_of_its_turn_alone(server, configured, capsys):
    helpers = helpers_of(cast(configured, concurrency=1))
    server.answer, server.script = as_all_helpers, ["blocked prompt"]
    pairs = [a_pair(f"x{i}", ANSWER) for i in range(3)]
    rollouts = rollouts_of(helpers, pairs, lambda pair, said: f"{pair.target} or so")
    assert [rollout.outcome for rollout in rollouts] == ["helper_failed", "bad_outcome", "bad_outcome"]
    assert rollouts[0].pair is pairs[0]
    assert [each.pair.rejected for each in rollouts[1:]] == [[("model", f"{pair.target} or so")] for pair in pairs[1:]]
    capsys.readouterr()
    helpers.report("they stay")
    said = capsys.readouterr().out
    assert said.startswith("action_model_config: 1 of 3 requests brought nothing of use; the last one: ")
    assert "PROHIBITED_CONTENT" in said and said.endswith("; they stay\n")


def test_intents_are_summarised_once_and_only_when_a_user_is_first_asked():
    summarised, simulated = [], []

    def summarize(pairs):
        summarised.append([pair.target for pair in pairs])
        return [None if pair.target == "b is 42" else f"intent of {pair.target}" for pair in pairs]

    def simulate(requests):
        simulated.append(len(requests))
        return [f"{intent}, {said[-1][1]}" for _, said, intent in requests]

    pairs = [a_pair("a"), a_pair("b"), a_pair("c", ANSWER)]
    user = helpers_by(intent_model=summarize, user_simulator=simulate).answers(pairs, "drop_f1")["simulate"]
    said = [[("model", f"{name}?")] for name in "abc"]
    assert summarised == []
    assert user([0, 1], said[:2]) == ["intent of a is 42, a?", None]
    assert user([0, 1, 2], said) == ["intent of a is 42, a?", None, "intent of c is 42, c?"]
    assert user([1], said[1:2]) == [None]
    assert list(filter(None, summarised)) == [["a is 42", "b is 42"], ["c is 42"]]
    assert sum(simulated) == 3, "where an intent is not known nobody is asked for a reply"


def test_a_user_by_rule_knows_the_gold_trajectory_and_needs_no_intent(server, configured):
    """All other roles are played by a model, but nobody's intent is summarised."""
    config = replace(cast(configured), user_simulator_config=act.HelperConfig(backend="rule"))
    pairs = [a_pair("a"), a_pair("b", ANSWER)]
    user = helpers_of(config).answers(pairs, "drop_f1")["simulate"]
    assert user([0, 1], [[pair.gold[0]] for pair in pairs]) == ["2019", data.NOTHING_TO_ADD]
    assert asked(server) == []


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

    helpers = helpers_by(action_model=lambda texts: [actions[text] for text in texts], user_simulator=simulate)
    policy = respond_by(lambda pair, trajectory: said[pairs.index(pair)][len(trajectory) // 2], pairs)
    answers = {"respond": policy, **helpers.answers(pairs, "exact_match")}
    samples = act.in_lockstep([act.play_turn(pair, 3, data.exact_match) for pair in pairs], answers)
    assert [sample["inferred_action"] for sample in samples] == [CLARIFY, None, ANSWER, None]
    assert len({tuple(sample) for sample in samples}) == 1, "the same keys, in the same order"
    metrics = act.summarize(samples)
    assert metrics["Helper Failures"] == 2
    assert [metrics[f"{name} Turns"] for name in ("Trajectory-level", "Turn-Level", "Post-Clarification")] == [2, 2, 1]
    assert metrics["Trajectory-level Exact Match"] == 0.5 and metrics["Accuracy"] == 1.0
    assert act.summarize(samples[1:2])["Trajectory-level Exact Match"] is None


def test_gold_actions_fall_back_to_the_rule():
    said = {"Who?": None, "He.": None, "Why?": ANSWER}
    helpers = helpers_by(action_model=lambda texts: [said[text] for text in texts])
    messages = [{"role": role, "content": text} for reply in said for role, text in (("user", "x"), ("model", reply))]
    rows = [{"messages": messages, "path": "c.jsonl", "line": 1}]
    act.make_pairs("c.jsonl", rows, Config(), helpers, trained_on=False)
    labels = [message["requires_clarification"] for message in messages[::2]]
    assert labels == [True, False, False]
    classify = helpers.answers([], "drop_f1")["classify"]
    assert classify([0, 1, 2], list(said)) == [None, None, ANSWER], "the policy's do not"


def test_what_a_conversation_asks_for_is_answered_by_the_heuristic_that_is_set():
    helpers = helpers_by()
    answers = helpers.answers([a_pair("a"), a_pair("b")], "exact_match")
    assert set(answers) == {"classify", "simulate", "score"}
    said = [[("model", "Which?"), ("user", "2019"), ("model", text)] for text in ("A IS 42", "a is 42")]
    assert answers["score"]([0], said[:1]) == [(1.0, 1.0)] and answers["score"]([0, 1], said) == [(1, 1), (0, 0)]
    drop = helpers.answers([a_pair("a")], "drop_f1")["score"]
    assert drop([0], [[("model", "a is 41 and more")]]) == [data.drop_f1("a is 41 and more", "a is 42")]


def test_a_gold_query_that_fails_is_named_by_its_line():
    pair = replace(a_pair("a", ANSWER), target="SELECT b FROM t", path="x.jsonl", line=7, context="CREATE TABLE t (a)")
    with pytest.raises(InputError, match=r"^x\.jsonl:7: execution_match: the gold query 'SELECT b FROM t' fails"):
        helpers_by().answers([pair], "execution_match")["score"]([0], [[("model", "SELECT a FROM t")]])


def test_failures_in_a_row_stop_the_run_and_a_success_between_them_does_not(server, configured):
    helper = helpers_of(cast(configured, "action_model_config", concurrency=1, max_retries=0, max_failures=3))
    classify = helper.roles["action_model_config"]
    server.answer = lambda prompt: "ANSWER"
    server.script = ["503", "blocked prompt", "good", "503", "empty text", "503", "good"]
    assert classify(["a", "b", "c", "d", "e"]) == [None, None, ANSWER, None, None]
    with pytest.raises(act.RunStopped) as raised:
        classify(["f"])
    why = "HTTP 503: overloaded"
    assert line_of(raised) == f"action_model_config: 3 failures in a row, at last {why}"


def test_one_answer_to_many_equal_requests_is_one_failure(server, configured):
    """Turns of a dialogue, and samples of a turn, ask the same."""
    server.answer = lambda prompt: "ANSWER" if "fine" in prompt else "Sure thing."
    classify = helpers_of(cast(configured, "action_model_config", max_failures=3)).roles["action_model_config"]
    assert classify(["odd"] * 40) == [None] * 40 and sum(classify.failed) == 40
    with pytest.raises(act.RunStopped, match="3 failures in a row"):
        classify(["odd 1", "odd 2", "odd 3", "fine"])


def test_answers_that_are_of_no_use_stop_the_run_and_a_useful_one_between_them_does_not(server, configured):
    """A model that never says what it is asked for would leave every pair as it was, and look like a run."""
    server.answer = lambda prompt: "Sure thing." if "odd" in prompt else "ANSWER"
    classify = helpers_of(cast(configured, "action_model_config", max_failures=3)).roles["action_model_config"]
    assert classify(["odd 1", "odd 2", "fine", "odd 3", "odd 4"]) == [None, None, ANSWER, None, None]
    with pytest.raises(act.RunStopped) as raised:
        classify(["odd 5"])
    assert line_of(raised) == "action_model_config: 3 failures in a row, at last 'Sure thing.' (max_new_tokens 128)"


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_closing_lines_say_how_many_requests_each_helper_failed(server, world, tmp_path, capsys):
    """Of 95 simulated turns 77 failed, and the run ended with status 0 and no word."""

    def answer(prompt):
        return "<think>What would they say?" if prompt.endswith("\nUser:") else as_all_helpers(prompt)

    server.answer = answer
    config = run_config(world, tmp_path, max_new_tokens=6)
    assert run("--config", config, *flags_for(server, "--helper_config.max_failures", 1000)) == 0
    said = capsys.readouterr().out
    line = re.search(r"^user_simulator_config: (\d+) of (\d+) requests brought nothing of use; the last one: (.*); these turns kept their pair,"
                     r" or are left out of the means$", said, re.MULTILINE)  # fmt: skip
    assert line and line[1] == line[2] != "0"
    assert line[3].startswith("'<think>What would") and "max_new_tokens" in line[3]
    failed = sum(row["outcome"] == "helper_failed" for row in rows_of(tmp_path / "out" / "rollouts.jsonl"))
    failed += sum(row.get("eval/Helper Failures", 0) for row in rows_of(tmp_path / "out" / "metrics.jsonl"))
    assert failed == int(line[1]), "each asked once"
    others = re.findall(r"^(\w+): (\d+) of (\d+) requests brought nothing of use$", said, re.MULTILINE)
    assert {name for name, *_ in others} >= {"action_model_config", "intent_model_config"}
    assert {count for _, count, _ in others} == {"0"}


def test_sigterm_is_acted_on_while_a_helper_hangs(server, world, tmp_path):
    """The run stops, in one line, though the call would hang on for minutes; torchrun would kill it after 30 seconds."""
    server.answer = lambda prompt: None if prompt.endswith("Action:") else as_all_helpers(prompt)
    server.instead = "hang"
    words = "--config", run_config(world, tmp_path), *flags_for(server, "--helper_config.timeout", "300")
    [program] = start_on_ranks(1, tmp_path, *words)
    log, deadline = tmp_path / "log", time.monotonic() + 60

    def wait_for(condition):
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert condition(), log.read_text()

    try:
        wait_for(lambda: any(prompt.endswith("Action:") for prompt in asked(server)))
        began = time.monotonic()
        os.kill(program.pid, signal.SIGTERM)
        wait_for(lambda: "act.py: stopped: interrupted" in log.read_text())
        assert time.monotonic() - began < 10
        server.over.set()
        program.join(20)
        assert program.exitcode == 1
    finally:
        program.kill()


def test_each_rank_asks_for_its_share_only_and_all_know_all_answers(server, other_server, world, tmp_path):
    """The pairs of two ranks are those of one, for the same calls; then one is refused and both stop."""
    server.answer = other_server.answer = as_all_helpers
    calls = []
    for count, each in ((1, server), (2, other_server)):
        folder = tmp_path / f"{count}"
        words = ["--config", run_config(world, folder, task="generate_preference"), *flags_for(each)]
        statuses, said = (run(*words), "") if count == 1 else run_on_ranks(count, folder, *words)
        assert statuses in (0, [0, 0]), said
        calls.append(sorted(asked(each)))
    assert calls[0] == calls[1] and len(calls[0]) == len(set(calls[0])) > 4
    files = [(tmp_path / count / "out" / "train.jsonl").read_bytes() for count in "12"]
    assert files[0] == files[1] and b"Which year?" in files[0]


def test_a_helper_that_is_refused_on_one_rank_stops_all(server, world, tmp_path):
    refused = []

    def answer(prompt):
        refused.append(prompt)
        return None if len(refused) == 6 else as_all_helpers(prompt)  # of one rank

    server.answer, server.instead = answer, "401"
    words = ["--config", run_config(world, tmp_path, task="generate_preference"), *flags_for(server)]
    statuses, said = run_on_ranks(2, tmp_path, *words)
    assert statuses == [1, 1] and said.count("act.py: stopped: m: HTTP 401: no credentials") == 1


# ----------------------------------------------------------------------------------------------------------------------
# The judge


def as_judge(prompt):
    """Whether the answer ends with the reference's last word; of some, nothing that can be used."""
    found = re.search(r".*\nReference: ([^\n]*)\nAnswer: ([^\n]*)\nVerdict:\Z", prompt, re.DOTALL)
    gold, answer = found.groups() if found else ("yes", "yes")
    if "blocked" in answer:
        return None
    if "unclear" in answer:
        return "It could be RIGHT or WRONG."
    return "**RIGHT**" if answer.split()[-1] == gold.split()[-1] else "Verdict: Wrong."


@pytest.mark.parametrize("dialect", act.DIALECTS)
def test_a_batch_is_judged_by_a_model(server, configured, dialect, capsys):
    """RIGHT wins, WRONG loses, and where there is no verdict the pair stays; only answers are judged, side by side."""
    server.answer = as_judge
    pairs = [a_pair("a"), a_pair("b"), *(a_pair(name, ANSWER) for name in "cdefg")]
    finals = ["It would be 42", "It would be 41", "That was 42", "Sorry, 41", "unclear", "blocked", "Which 42?"]
    helpers, rounds = helpers_of(cast(configured, "judge_model_config", backend=dialect)), []
    judge = helpers.roles["judge_model_config"]
    helpers.roles["judge_model_config"] = lambda ends: rounds.append(len(ends)) or judge(ends)

    def respond(pair, said):
        return pair.gold[0][1] if pair.action == CLARIFY and not said else finals[pairs.index(pair)]

    rollouts = rollouts_of(helpers, pairs, respond, heuristic="judge")
    said = [[*pair.gold[:-1], ("model", final)] for pair, final in zip(pairs, finals, strict=True)]
    found = [rollout.pair for rollout in rollouts]
    assert found[0] == replace(pairs[0], chosen=said[0]) and found[1] == replace(pairs[1], rejected=said[1])
    assert found[2] == replace(pairs[2], chosen=said[2]) and found[3] == replace(pairs[3], rejected=said[3])
    assert found[4] is pairs[4] and found[5] is pairs[5] and found[6] == replace(pairs[6], rejected=said[6])
    outcomes = ["good_outcome", "bad_outcome"] * 2 + ["helper_failed"] * 2 + ["wrong_action"]
    assert [rollout.outcome for rollout in rollouts] == outcomes
    assert [rollout.score for rollout in rollouts] == [1, 0, 1, 0, None, None, None]
    assert rounds == [4, 2], "those that answer at once together, then those that asked first"
    capsys.readouterr()
    helpers.report("")
    assert "judge_model_config: 2 of 6 requests brought nothing of use" in capsys.readouterr().out


def test_evaluation_with_a_judge(server, configured):
    """What it finds right is an exact match; first replies are still compared by DROP F1, turns without verdict not."""
    server.answer = as_judge
    pairs = [a_pair("a"), *(a_pair(name, ANSWER) for name in "bcd"), a_pair("e")]
    finals = ["surely 42", "b is 42", "c is 41", "unclear", "Which of them?"]  # the last asks on

    def policy(pair, said):
        return finals[pairs.index(pair)] if said or pair.action == ANSWER else pair.gold[0][1]

    helpers = helpers_of(cast(configured, "judge_model_config"))
    answers = {"respond": respond_by(policy, pairs), **helpers.answers(pairs, "judge")}
    samples = act.in_lockstep([act.play_turn(pair, 2) for pair in pairs], answers)
    assert [sample["f1"] for sample in samples] == [sample["exact_match"] for sample in samples] == [1, 1, 0, 0, 0]
    assert [sample["inferred_action"] for sample in samples] == [CLARIFY, ANSWER, ANSWER, None, CLARIFY]
    firsts = [pairs[0].gold[0][1], *finals[1:3], None, pairs[4].gold[0][1]]
    for sample, pair, first in zip(samples, pairs, firsts, strict=True):
        expected = data.drop_f1(first, pair.gold[0][1]) if first else (0.0, 0.0)
        assert (sample["turn_exact_match"], sample["turn_f1"]) == expected
    metrics = act.summarize(samples)
    assert metrics["Helper Failures"] == 1 and metrics["Trajectory-level Turns"] == 4
    assert metrics["Trajectory-level Exact Match"] == metrics["Trajectory-level DROP F1"] == 0.5
    assert len(asked(server)) == 4, "who never answers is not judged"


def test_a_judge_must_be_a_model(configured):
    config = replace(Config(), policy_model_config=PolicyModelConfig("x"),
                     data_config=act.DataConfig(train_path="x", heuristic="judge"))  # fmt: skip
    with pytest.raises(InputError, match="^heuristic is 'judge', expected a judge_model_config.backend that"):
        act.check_config(config)
    act.check_config(replace(config, judge_model_config=configured(backend="openai")))


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
    user = helpers_of(cast(configured)).answers([PAIR], "drop_f1")["simulate"]
    assert user([0], [PAIR.gold[:1]]) == ["The user wants points in the second league."]
    assert len(asked(server)) == 2 and "1,234" not in json.dumps([body for _, _, body in server.requests])


def test_questions_of_a_model_become_losing_sides(server, configured):
    server.answer = lambda prompt: "Assistant: Which year?\nUser: 2019"
    rows = data.read_vertex_jsonl(ROOT / "configs/tiny/train.jsonl")[:1]
    other = data.exchange("Who?", "Whom {do} you mean?", clarify=True) + data.exchange("Ada", "She.")
    write = helpers_of(cast(configured)).roles["preference_model_config"]
    pairs = data.ACTDataset([*rows, {"messages": other}], CLARIFY, 2, write).prepare_datasets()
    assert {pair.rejected[0] for pair in pairs if pair.action == ANSWER} == {("model", "Which year?")}
    prompts, asking = asked(server), "Assistant (asks a clarifying question):"
    assert prompts and all(prompt.endswith(f"\n{asking}") and prompt.count(asking) in (2, 3) for prompt in prompts)
    assert any(f"{asking} Whom {{do}} you mean?\n\n" in prompt for prompt in prompts)
    stops = [body["generationConfig"]["stopSequences"] for _, _, body in server.requests[1:]]
    assert stops and all(each == [ROLES["preference_model_config"].stop] for each in stops)


def test_a_question_that_cannot_be_read_is_one_of_the_datas(server, configured):
    server.answer = lambda prompt: "I would rather not."
    messages = data.exchange("a", "b?", True) + data.exchange("c", "d")
    write = helpers_of(cast(configured)).roles["preference_model_config"]
    pairs = data.ACTDataset([{"messages": messages}], CLARIFY, 1, write).prepare_datasets()
    assert pairs[1].rejected == [("model", "b?")] and len(asked(server)) == 1


def test_the_same_request_is_asked_once(server, configured):
    server.answer = lambda prompt: "CLARIFY" if prompt.endswith("Which?\nAction:") else "ANSWER"
    classify = helpers_of(cast(configured, "action_model_config", cache_path="")).roles["action_model_config"]
    assert classify(["Which?", "7", "Which?", "7", "7"]) == [CLARIFY, ANSWER, CLARIFY, ANSWER, ANSWER]
    assert len(asked(server)) == 2


def test_what_cannot_be_read_is_counted_and_becomes_nothing(server, configured, capsys):
    server.answer = lambda prompt: "Assistant: hm" if prompt.endswith("User:") else "Here it is:"
    helpers = helpers_of(cast(configured))
    requests = {"action_model_config": ["a", "b"], "intent_model_config": [PAIR],
                "user_simulator_config": [(PAIR, PAIR.gold[:1], "intent")],
                "preference_model_config": [(PAIR, [a_pair("x")])], "judge_model_config": [(PAIR, "7")]}  # fmt: skip
    capsys.readouterr()
    for name, each in requests.items():
        assert helpers.roles[name](each) == [None] * len(each)
    helpers.report("too bad")
    counts = [f"{name}: {len(requests[name])} of {len(requests[name])} requests brought nothing of use" for name in ROLES]
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("; the last one: ")[0] for line in said] == counts
    assert all(line.endswith("; too bad") for line in said)


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
def test_gemma_answers_each_prompt_alike_in_any_batch(monkeypatch, gemma_and_tokenizer, temperature):
    words = ["rome", "oslo", "item", "month", "place", "which"]
    prompts, continued, generate = [f"get revenue {'mar ' * i}{word}" for i, word in enumerate(words)], [], act.generate
    monkeypatch.setattr(act, "generate", lambda model, new, *args, **options: continued.extend(new) or generate(
        model, new, *args, **options))  # fmt: skip

    def ask(prompts, batch_size):
        config = act.HelperConfig(temperature=temperature, max_new_tokens=12, batch_size=batch_size)
        return act.gemma_backend(*gemma_and_tokenizer, config)(prompts)

    answers = ask(prompts, 6)
    assert len(set(answers)) > 2, "the model tells them apart"
    assert ask(prompts, 2) == answers and ask(prompts[::-1], 4) == answers[::-1]
    assert [ask([prompt], 1)[0] for prompt in prompts] == answers
    assert len(continued) == 6 * 4


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
    ask = act.gemma_backend(model, tokenizer, act.HelperConfig(max_new_tokens=12))
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
    monkeypatch.setattr(act, "load_helper", lambda *_: gemma_and_tokenizer)
    config = act.HelperConfig(backend="gemma", model_path="x", max_failures=3)
    classify = helpers_of(replace(Config(), action_model_config=config)).roles["action_model_config"]
    assert classify(["a", "b"]) == [None, None]
    with pytest.raises(act.RunStopped, match=r"^action_model_config: 3 failures in a row, at last '' \(max_new_tokens 128\)$"):
        classify(["c"])


@pytest.mark.parametrize("path", ["itself", "reference"])
def test_a_helper_whose_vocabulary_is_larger_than_its_embedding_is_refused(tmp_path, gemma_directory, path):
    """At the start: a token beyond the embedding would end a run at its first request, in any role."""
    shutil.copytree(gemma_directory, tmp_path / "model")
    config = GemmaConfig.from_json(tmp_path / "model" / "config.json")
    Gemma(replace(config, vocab_size=300)).save_pretrained(tmp_path / "model")
    policy = PolicyModelConfig(str(tmp_path / "model"))
    helper = act.HelperConfig(backend="gemma", model_path="reference" if path == "reference" else str(tmp_path / "model"))
    for role in ROLES.keys() - {"intent_model_config"}:  # which no user by rule needs
        with pytest.raises(InputError, match="tokenizer.model: 410 pieces, expected at most the model's vocab_size 300"):
            helpers_of(replace(Config(), policy_model_config=policy, **{role: helper}))


def test_roles_that_name_one_checkpoint_share_it(monkeypatch, gemma_directory):
    loaded, load = [], act.load_helper
    monkeypatch.setattr(act, "load_helper", lambda config, path: loaded.append(path) or load(config, path))
    local = act.HelperConfig(backend="gemma", model_path=str(gemma_directory), max_new_tokens=3)
    shared = replace(local, model_path="reference")
    config = replace(Config(), action_model_config=local, intent_model_config=local, judge_model_config=shared)
    config = replace(config, user_simulator_config=shared, preference_model_config=shared)
    config = replace(config, policy_model_config=PolicyModelConfig(str(gemma_directory)))
    helpers = helpers_of(config)
    assert loaded == [str(gemma_directory), "reference"]
    assert len(helpers.roles["action_model_config"](["a", "b"])) == 2
    assert len(helpers.roles["user_simulator_config"]([(PAIR, PAIR.gold[:1], "x")])) == 1
    assert len(helpers.roles["judge_model_config"]([(PAIR, "7")])) == 1


def test_a_model_id_means_gemini_and_nothing_means_rule(configured):
    fields = {}, {"model_id": "g"}, *({"backend": name, "model_id": "g"} for name in ("rule", "gemma", "openai"))
    backends = ["rule", "gemini", "rule", "gemma", "openai"]
    assert [act.backend_of(act.HelperConfig(**each)) for each in fields] == backends
    rules = helpers_of(Config())
    rules.roles["user_simulator_config"] = rules.roles["user_simulator_config"].func
    assert rules.roles == {name: role.rule for name, role in ROLES.items()} and not rules.models
    assert rules.answers([PAIR], "drop_f1")["simulate"]([0], [PAIR.gold[:1]]) == ["The second."]
    assert [model.name for model in helpers_of(cast(configured, "action_model_config")).models] == ["action_model_config"]


def test_what_models_are_told_is_among_the_files_that_must_not_change(tmp_path):
    """Also where it is the file that comes with this project; what nobody reads may change."""
    roles = {"user_simulator_config": act.HelperConfig(backend="openai", model_id="m"),
             "action_model_config": act.HelperConfig(model_id="g", prompt_path=str(tmp_path / "mine.txt")),
             "judge_model_config": act.HelperConfig(backend="rule")}  # fmt: skip
    assert {key: Path(path).resolve() for key, path in act.input_files(replace(Config(), **roles)).items()} == {
        "user_simulator_config.prompt_path": ROOT / "configs/prompts/user.txt",
        "action_model_config.prompt_path": tmp_path / "mine.txt",
    }


@pytest.mark.parametrize(("backend", "key"), [("gemma", "model_path"), ("gemini", "model_id"), ("openai", "model_id")])
def test_a_back_end_without_its_model_is_an_error_that_names_the_key(backend, key):
    config = replace(Config(), user_simulator_config=act.HelperConfig(backend=backend))
    with pytest.raises(InputError, match=f"^user_simulator_config.{key} is missing, backend '{backend}' needs it$"):
        helpers_of(config)


def test_the_published_cast_is_gemini_in_all_four_roles(monkeypatch):
    """Its models, temperatures and lengths; but "CLARIFY" is three tokens, where the published "Yes" is one."""
    monkeypatch.setattr(act.Client, "try_once", lambda client: None)  # it would call Google
    config = act.load_config("gemma2_2b_pacific_gemini.json")
    lengths = {"action_model_config": 8, "user_simulator_config": 64, "intent_model_config": 128,
               "preference_model_config": 64}  # fmt: skip
    for name, length in lengths.items():
        expected = act.HelperConfig("gemini", model_id="gemini-2.0-flash-001", temperature=0.1, max_new_tokens=length)
        assert getattr(config, name) == expected, name
    assert {model.name for model in helpers_of(config).models} == {*lengths}
    plain = act.load_config("gemma2_2b_pacific.json")  # the same run otherwise
    others = {name: getattr(plain, name) for name in lengths}
    training = replace(config.training_config, output_dir=plain.training_config.output_dir)
    assert replace(config, **others, training_config=training) == plain


# ----------------------------------------------------------------------------------------------------------------------
# Prompts of one's own


@pytest.mark.parametrize("name", ROLES)
def test_a_role_is_told_what_the_file_of_its_prompt_says(server, configured, tmp_path, name):
    """Each {name} is filled once: what stands in the texts is not looked at, and other braces stay as they are."""
    role, path = ROLES[name], tmp_path / "prompt.txt"
    path.write_text(" {{x}} {other} {" + "}\n{".join(role.names) + "}{0}\n\n", encoding="utf-8", newline="\r\n")
    users = {"user_simulator_config": configured()}  # no rule: an intent is needed
    helpers = helpers_of(replace(Config(), **{**users, name: configured(prompt_path=str(path))}))
    odd = "{response} {conversation} {intent} {examples} {gold} {answer} {other} \\1 \\g<0>?"
    pair = Pair("", [("user", odd)], CLARIFY, *[[("model", odd), ("user", odd), ("model", "x")]] * 3, "x")
    request = {
        "action_model_config": odd,
        "user_simulator_config": (pair, [("model", odd)], odd),
        "intent_model_config": pair,
        "preference_model_config": (pair, [pair]),
        "judge_model_config": (pair, odd),
    }[name]
    helpers.roles[name]([request])
    filled = role.fields(request)
    want = " {{x}} {other} " + "\n".join(filled[each] for each in role.names) + "{0}\n"
    assert asked(server) == [want] and odd in want


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("content", [b"", b"Say something.", b"{}", b"{ response } {conversations} {Intent} {example}"])
def test_a_prompt_that_lacks_a_name_is_refused_with_its_file(configured, tmp_path, name, content):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    config = replace(Config(), user_simulator_config=configured())
    with pytest.raises(InputError) as error:
        helpers_of(replace(config, **{name: configured(prompt_path=str(path))}))
    assert str(error.value).startswith(f"{path}: lacks {{{ROLES[name].names[0]}}}, expected a prompt with ")


def test_a_prompt_that_is_not_there_or_not_text_is_refused(configured, tmp_path):
    (tmp_path / "latin.txt").write_bytes("é {response}".encode("latin-1"))
    for name, message in (("none.txt", "cannot be read"), ("latin.txt", "not UTF-8")):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            helpers_of(cast(configured, "action_model_config", prompt_path=str(tmp_path / name)))


def test_shipped_prompts_are_found_from_any_directory(monkeypatch, server, configured, tmp_path):
    monkeypatch.chdir(tmp_path)
    helpers_of(cast(configured)).roles["action_model_config"](["Who?"])
    shipped = (ROOT / "configs/prompts/action.txt").read_text(encoding="utf-8")
    assert asked(server) == [shipped.removesuffix("\n").replace("{response}", "Who?")]
