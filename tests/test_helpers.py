"""Helper models: Gemini's REST API played by a local server that misbehaves, a local Gemma, prompts and what is read from answers."""

import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import act
import data
from act import Config, Pair, PolicyModelConfig
from data import ANSWER, CLARIFY, InputError
from gemma import Gemma2, Gemma2Config, Tokenizer

ROOT = Path(__file__).parent.parent
KEY = "AIza-not-a-real-key_0123456789"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """A key, no proxy before the local server, waits that a test can sit out, counters at zero, one thread for tiny models."""
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(act, "FIRST_WAIT", 0.01)
    act.HELPER_COUNTS.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------------------
# A server in Gemini's place


def reply_with(text, **candidate):
    return {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP", **candidate}]}


def failure_with(message, **error):
    return {"error": {"message": message, **error}}


RETRY_INFO = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}]
ECHO = f"API key {KEY} is not valid.\nPass a valid one."  # some servers put the key into what they say
REPLIES = {  # name -> (status, headers, JSON)
    "429": (429, {}, failure_with("quota exceeded")),
    "429 with Retry-After": (429, {"Retry-After": "7"}, failure_with("quota exceeded")),
    "429 with RetryInfo": (429, {}, failure_with("quota exceeded", details=RETRY_INFO)),
    "429 for an hour": (429, {"Retry-After": "3600"}, failure_with("quota exceeded")),
    "429 until a date": (429, {"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}, ["not an error object"]),
    "500": (500, {}, failure_with("internal")),
    "503": (503, {}, "overloaded"),
    "400": (400, {}, failure_with(ECHO)),
    "401": (401, {}, failure_with("no credentials")),
    "403": (403, {}, failure_with(ECHO)),
    "404": (404, {}, failure_with("models/nobody is not found")),
    "redirect": (302, {"Location": "http://127.0.0.1:9/elsewhere"}, {}),
    "list": (200, {}, []),
    "odd candidates": (200, {}, {"candidates": {"text": "no list"}}),
    "no candidates": (200, {}, {"candidates": []}),
    "blocked prompt": (200, {}, {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}),
    "SAFETY": (200, {}, reply_with("half a sent", finishReason="SAFETY")),
    "RECITATION": (200, {}, {"candidates": [{"finishReason": "RECITATION"}]}),
    "empty text": (200, {}, reply_with("")),
    "blank text": (200, {}, reply_with(" \n")),
    "all thought": (200, {}, reply_with("", finishReason="MAX_TOKENS", content={"parts": [{"text": "hm", "thought": True}]})),
    "MAX_TOKENS": (200, {}, reply_with("cut off", finishReason="MAX_TOKENS")),
    "parts": (200, {}, reply_with("", content={"parts": [{"text": "a", "thought": True}, {"text": "two "}, {"text": "parts"}]})),
    "half a character": (200, {}, reply_with("odd \ud83d end")),
    "key in the answer": (200, {}, reply_with(f"your key is {KEY}")),
    "key in the reason": (200, {}, {"promptFeedback": {"blockReason": KEY}}),
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["contents"][0]["parts"][0]["text"]
        with self.server.lock:
            self.server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            behaviour = self.server.script.pop(0) if self.server.script else "good"
        time.sleep(self.server.delay)
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
        elif behaviour == "not HTTP":
            self.wfile.write(f"{KEY} to you too\r\n\r\n".encode())
        else:
            status, headers, reply = REPLIES.get(behaviour) or (200, {}, reply_with(self.server.answer(prompt)))
            self.send(status, headers, json.dumps(reply).encode())

    def send(self, status, headers, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def handle_error(self, *_):
        pass  # a client that has hung up


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.lock, server.over, server.requests, server.script, server.delay = threading.Lock(), threading.Event(), [], [], 0.0
    server.answer = lambda prompt: f"answer to {prompt}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def configured(server, tmp_path):
    """HelperConfig for that server, with changes."""

    def make(**changes):
        address = f"http://127.0.0.1:{server.server_port}"
        fields = {"model_id": "gemini-test", "base_url": address, "timeout": 5.0, "cache_path": str(tmp_path / "cache.sqlite")}
        return act.HelperConfig(**{**fields, **changes})

    return make


def counts(**expected):
    """The counters that are not zero."""
    return expected == {name: number for name, number in act.HELPER_COUNTS.items() if number}


def line_of(raised):
    text = str(raised.value)
    assert "\n" not in text and KEY not in text
    return text


# ---------------------------------------------------------------------------------------------------------------------------------
# What each misbehaviour leads to

AGAIN = (
    "429", "429 with RetryInfo", "429 until a date", "500", "503", "reset", "hang up", "hang", "half an answer", "invalid JSON", "not HTTP",
    "list", "odd candidates",
)  # fmt: skip
EMPTY = "no candidates", "blocked prompt", "SAFETY", "RECITATION", "empty text", "blank text", "all thought", "key in the reason"
ANSWERED = {
    "MAX_TOKENS": "cut off",
    "parts": "two parts",
    "half a character": "odd ? end",
    "key in the answer": "your key is [key]",
}
FATAL = {
    "400": "gemini-test: HTTP 400: API key [key] is not valid. Pass a valid one.",
    "401": "gemini-test: HTTP 401: no credentials",
    "403": "gemini-test: HTTP 403: API key [key] is not valid. Pass a valid one.",
    "404": "gemini-test: HTTP 404: models/nobody is not found",
    "redirect": "gemini-test: HTTP 302: Found",
}


@pytest.mark.parametrize("behaviour", AGAIN)
def test_what_may_pass_is_tried_again(monkeypatch, server, configured, behaviour):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    server.script = [behaviour]
    asker = act.GeminiAsker(configured(timeout=0.25 if behaviour == "hang" else 5.0))
    assert asker(["p"]) == ["answer to p"]
    assert len(server.requests) == 2 and counts(asked=1, retried=1)


@pytest.mark.parametrize("behaviour", AGAIN)
def test_what_does_not_pass_is_given_up_and_not_stored(monkeypatch, server, configured, behaviour):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    server.script = [behaviour] * 3
    asker = act.GeminiAsker(configured(timeout=0.25 if behaviour == "hang" else 5.0, max_retries=2))
    assert asker(["p"]) == [None]
    assert len(server.requests) == 3 and counts(asked=1, retried=2, failed=1)
    assert asker(["p"]) == ["answer to p"], "it was not taken for an answer"


def test_a_refused_connection_is_tried_again_and_given_up(server, configured):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        asker = act.GeminiAsker(configured(base_url=f"http://127.0.0.1:{closed.getsockname()[1]}", max_retries=2))
        assert asker(["p"]) == [None]
    assert counts(asked=1, retried=2, failed=1)


@pytest.mark.parametrize("behaviour", EMPTY)
def test_a_blocked_or_empty_answer_is_none_at_once_and_not_stored(server, configured, behaviour):
    server.script = [behaviour]
    asker = act.GeminiAsker(configured())
    assert asker(["p"]) == [None]
    assert len(server.requests) == 1 and counts(asked=1, blocked=1)
    assert asker(["p"]) == ["answer to p"]


@pytest.mark.parametrize("behaviour", ANSWERED)
def test_unusual_answers_are_answers(server, configured, behaviour):
    server.script = [behaviour]
    assert act.GeminiAsker(configured())(["p"]) == [ANSWERED[behaviour]]
    assert counts(asked=1)


@pytest.mark.parametrize("behaviour", FATAL)
def test_a_refused_request_stops_at_once(server, configured, behaviour):
    server.script = [behaviour] * 3
    asker = act.GeminiAsker(configured(concurrency=1))
    with pytest.raises(act.HelperError) as raised:
        asker(["p", "q", "r"])
    assert line_of(raised) == FATAL[behaviour]
    with pytest.raises(act.HelperError) as raised:
        asker(["s"])
    assert line_of(raised) == FATAL[behaviour], "and stays so"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("behaviour", "waits"),
    [
        ("500", [1, 2, 4, 8, 16, 32, 60, 60]),
        ("429 with Retry-After", [8, 9, 11, 15, 23, 39, 60, 60]),
        ("429 with RetryInfo", [35, 36, 38, 42, 50, 60, 60, 60]),
        ("429 for an hour", [60] * 8),
    ],
)
def test_waits_double_and_begin_when_the_server_says_so(monkeypatch, server, configured, behaviour, waits):
    """The jitter is drawn from 0 up to the doubling wait; here it is always at its upper end."""
    drawn, waited = [], []
    monkeypatch.setattr(act, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: drawn.append((low, high)) or high)
    server.script = [behaviour] * 8
    asker = act.GeminiAsker(configured(max_retries=8))
    asker.spent.wait = waited.append
    assert asker(["p"]) == ["answer to p"]
    assert waited == waits and drawn == [(0, 2**i) for i in range(8)]


def test_failures_in_a_row_stop_the_run_and_a_success_between_them_does_not(server, configured):
    server.script = ["503", "blocked prompt", "good", "503", "empty text", "503", "good"]
    asker = act.GeminiAsker(configured(concurrency=1, max_retries=0, max_failures=3))
    with pytest.raises(act.HelperError) as raised:
        asker(["a", "b", "c", "d", "e", "f", "g"])
    assert line_of(raised) == "3 requests to gemini-test in a row failed, the last one with: HTTP 503: Service Unavailable"
    assert len(server.requests) == 6 and act.HELPER_COUNTS["failed"] == 3 and act.HELPER_COUNTS["blocked"] == 2
    assert act.GeminiAsker(configured())(["c"]) == ["answer to c"] and len(server.requests) == 6, "what was answered before is kept"


def test_after_the_stop_nothing_waits_for_calls_that_would_be_tried_again(monkeypatch, server, configured):
    monkeypatch.setattr(act, "FIRST_WAIT", 30.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    server.script = ["503"] * 7 + ["400"]
    began = time.monotonic()
    with pytest.raises(act.HelperError):
        act.GeminiAsker(configured(concurrency=8))([f"{i}" for i in range(8)])
    assert time.monotonic() - began < 5


def test_after_the_stop_nothing_waits_for_calls_in_flight(server, configured):
    server.script, began = ["hang", "400"], time.monotonic()
    with pytest.raises(act.HelperError):
        act.GeminiAsker(configured(concurrency=2))(["a", "b"])
    assert time.monotonic() - began < 2.5


# ---------------------------------------------------------------------------------------------------------------------------------
# The key, the request, the cache, concurrency


def test_the_key_is_nowhere_but_in_its_header(monkeypatch, server, configured, tmp_path, capfd, caplog):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    server.script = ["key in the answer", "key in the reason", "not HTTP"]
    errors = []
    for behaviour, prompts in [("good", ["a", "b", "c"]), ("400", ["d"]), ("403", ["e"]), ("key in the reason", ["f"])]:
        server.script.append(behaviour)
        asker = act.GeminiAsker(configured(concurrency=1, max_retries=1, max_failures=1 if prompts == ["f"] else 20))
        try:
            assert KEY not in repr(asker(prompts))
        except act.HelperError as error:
            errors.append(error)
    assert len(errors) == 3
    for error in errors:
        while error:
            assert KEY not in "".join(traceback.format_exception(error)) + repr(error.args)
            error = error.__cause__ or error.__context__
    assert all(KEY not in path + json.dumps(body) and headers.get("x-goog-api-key") == KEY for path, headers, body in server.requests)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert (tmp_path / "cache.sqlite").stat().st_size > 0
    said = capfd.readouterr()
    assert KEY not in said.out + said.err + caplog.text


@pytest.mark.parametrize("key", [None, "", "  ", "two words", "line\nbreak", "schlüssel"])
def test_a_missing_or_odd_key_is_an_error_before_any_call(monkeypatch, configured, key):
    monkeypatch.delenv("GOOGLE_API_KEY")
    if key is not None:
        monkeypatch.setenv("GOOGLE_API_KEY", key)
    with pytest.raises(InputError, match="^GOOGLE_API_KEY .*'gemini-test'$") as raised:
        act.GeminiAsker(configured())
    assert not key or not key.strip() or key not in str(raised.value)


@pytest.mark.parametrize("url", ["", "example.org", "file:///etc/hosts", "https://", f"https://example.org/?key={KEY}", f"https://{KEY}@a.org"])
def test_an_odd_address_is_an_error_that_does_not_repeat_it(configured, url):
    with pytest.raises(InputError, match="^base_url of a helper model: expected http") as raised:
        act.GeminiAsker(configured(base_url=url))
    assert KEY not in str(raised.value)


def test_the_request_has_the_documented_form(server, configured):
    act.GeminiAsker(configured(temperature=0.5, max_new_tokens=9), ("\nUser:",))(["Grüße 😀"])
    [(path, headers, body)] = server.requests
    assert path == "/v1beta/models/gemini-test:generateContent" and headers["content-type"] == "application/json"
    assert body.pop("contents") == [{"role": "user", "parts": [{"text": "Grüße 😀"}]}]
    sampling = {"temperature": 0.5, "topP": 1.0, "topK": 40, "maxOutputTokens": 9, "stopSequences": ["\nUser:"]}
    assert body.pop("generationConfig") == sampling
    assert {row["threshold"] for row in body.pop("safetySettings")} == {"BLOCK_NONE"} and not body


def test_an_answer_is_paid_once_in_this_process_and_the_next(server, configured):
    config = configured()
    assert act.GeminiAsker(config)(["a", "b", "a", "a"]) == ["answer to a", "answer to b", "answer to a", "answer to a"]
    assert len(server.requests) == 2 and counts(asked=2)
    assert act.GeminiAsker(config)(["b", "a"]) == ["answer to b", "answer to a"] and counts(asked=2, cached=2)
    module = sys.modules[act.GeminiAsker.__module__]
    code = """import sys, {} as m
print(m.GeminiAsker(m.HelperConfig(model_id='gemini-test', base_url=sys.argv[1], cache_path=sys.argv[2]))(['a']))"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(module.__file__).parent}"}
    command = [sys.executable, "-c", code.format(module.__name__), config.base_url, config.cache_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == "['answer to a']\n", result.stderr
    assert len(server.requests) == 2


def test_another_model_or_another_request_is_another_answer(server, configured):
    for changes in ({}, {"model_id": "gemini-other"}, {"temperature": 0.5}, {"max_new_tokens": 5}, {"concurrency": 2, "timeout": 4.0}):
        act.GeminiAsker(configured(**changes))(["a"])
    assert len(server.requests) == 4, "how a call is made does not matter, what is asked does"


def test_threads_share_one_cache_file(tmp_path):
    caches = [act.AnswerCache(tmp_path / "c.sqlite") for _ in range(4)]  # as four processes would hold them
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: caches[i % 4].put(f"key {i // 4}", f"value {i // 4}"), range(80)))
    assert [caches[3].get(f"key {i}") for i in range(20)] == [f"value {i}" for i in range(20)] and caches[0].get("key 20") is None


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "c.sqlite").write_text("something else" * 100)
    with pytest.raises(act.HelperError, match=r"c\.sqlite: not usable as the cache of helper models \(file is not a database\)"):
        act.AnswerCache(tmp_path / "c.sqlite").get("key")


def test_calls_of_a_batch_go_out_together(server, configured):
    server.delay, seconds = 0.3, []
    for attempt in range(3):  # a busy machine may spoil one
        began = time.monotonic()
        assert len(act.GeminiAsker(configured())([f"{attempt}/{i}" for i in range(16)])) == 16
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
    act.GeminiAsker(configured(concurrency=3))([f"{i}" for i in range(12)])
    assert 2 <= most[0] <= 3


# ---------------------------------------------------------------------------------------------------------------------------------
# ACT with helpers that fail, and that take their time


def a_pair(name, action=CLARIFY):
    """Asks for a year, or answers at once."""
    question, reply, answer = ("model", f"Which year of {name}?"), ("user", "2019"), ("model", f"{name} is 42")
    sides = ([question, reply, answer], [answer]) if action == CLARIFY else ([answer], [question])
    history = [("user", f"What is {name}?")]
    record = {"input_text": data.format_prompt("", history)}
    return Pair("", history, action, *sides, sides[0], answer[1], data.INSTRUCTION, record)


def test_a_batch_does_what_act_pair_does_one_by_one_also_where_helpers_fail():
    """Random worlds: what the policy says, what the classifier makes of it and whether the user replies depends on the place alone."""
    seen = set()
    for seed in range(300):
        pairs = [a_pair(f"{seed}.{i}", random.Random(f"{seed}/{i}").choice([CLARIFY, ANSWER])) for i in range(4)]

        def draw(options, *place, seed=seed):
            return random.Random(f"{seed}/{place}").choice(options)

        def respond(pair, trajectory):
            return draw([pair.target, "other", pair.chosen[0][1]], pair.target, len(trajectory)) + " " * len(trajectory)

        def classify(text):
            return draw([CLARIFY, CLARIFY, ANSWER, None], text)

        def reply(pair, trajectory):
            return draw(["2019", "2018", None], pair.target, len(trajectory), "user")

        def score(text, target):
            return float(text.strip() == target)

        expected = [act.act_pair(pair, respond, classify, reply, score, 0.5, 3) for pair in pairs]
        found = act.act_pairs(
            pairs,
            lambda rows, trajectories, pairs=pairs: [respond(pairs[row], said) for row, said in zip(rows, trajectories, strict=True)],
            lambda texts: list(map(classify, texts)),
            lambda rows, trajectories, pairs=pairs: [reply(pairs[row], said) for row, said in zip(rows, trajectories, strict=True)],
            score, 0.5, 3,
        )  # fmt: skip
        assert list(zip(*found, strict=True)) == expected
        assert all(new is pair for pair, (new, outcome) in zip(pairs, expected, strict=True) if outcome == act.HELPER_FAILED)
        seen.update(outcome for _, outcome in expected)
    assert seen == set(act.OUTCOMES)


@pytest.mark.parametrize(
    ("actions", "replies"),
    [([None], []), ([CLARIFY], [None]), ([CLARIFY, None], ["2019"]), ([CLARIFY, CLARIFY], ["2019", None])],
)
def test_wherever_a_helper_fails_the_original_pair_stays(actions, replies):
    pair, actions, replies = a_pair("x"), list(actions), list(replies)
    result = act.act_pair(pair, lambda *_: "text", lambda _: actions.pop(0), lambda *_: replies.pop(0), None, 0.5, 3)
    assert result == (pair, "helper_failed") and result[0] is pair and not actions and not replies


def helpers_of(configured, **changes):
    cast = {role: configured(**changes) for role in act.ROLES}
    return act.build_helpers(replace(Config(), **cast))


def as_all_helpers(prompt):
    """A well-behaved model in all roles, for the policy of the next test."""
    if prompt.endswith("Action:"):
        return "CLARIFY" if prompt.splitlines()[-2].endswith("?") else "ANSWER"
    return {"Intent:": "The user wants 2019.", "User:": "2019"}[prompt.split()[-1]]


def test_sixteen_rollouts_take_as_long_as_their_longest_chain_of_calls(server, configured, tmp_path):
    """classify -> simulate -> classify: three calls of 0.3 s, with the intents asked for meanwhile; one by one it would be 64 calls."""
    server.delay, server.answer, seconds = 0.3, as_all_helpers, []
    pairs = [a_pair(f"x{i}") for i in range(16)]

    def respond(rows, trajectories):
        return [pairs[row].target if said else pairs[row].chosen[0][1] for row, said in zip(rows, trajectories, strict=True)]

    for attempt in range(3):  # a busy machine may spoil one
        helpers = helpers_of(configured, cache_path=str(tmp_path / f"{attempt}.sqlite"))
        began, before = time.monotonic(), len(server.requests)
        user = act.user_for(pairs, helpers)
        new, outcomes = act.act_pairs(pairs, respond, helpers.classify_actions, user, lambda text, gold: text == gold, 0.5, 3)
        seconds.append(time.monotonic() - began)
        assert outcomes == [act.GOOD_OUTCOME] * 16 and len(server.requests) - before == 64
        assert [pair.chosen for pair in new] == [pair.gold for pair in pairs]
        if seconds[-1] <= 1.25 * 0.9:
            break
    assert min(seconds) <= 1.25 * 0.9


def test_intents_are_summarised_once_and_only_where_they_may_be_needed():
    asked = []

    def summarize(pairs):
        asked.append([pair.target for pair in pairs])
        return [None if pair.target == "b is 42" else f"intent of {pair.target}" for pair in pairs]

    def simulate(conversations):
        return [intent and f"{intent}, {messages[-1][1]}" for messages, intent in conversations]

    pairs = [a_pair("a"), a_pair("b"), a_pair("c", ANSWER)]
    for early in (True, False):
        asked.clear()
        user = act.user_for(pairs, act.Helpers(None, summarize, simulate, None, early_intents=early))
        said = [[("model", "q?")]] * 3
        assert user([0, 1], said[:2]) == ["intent of a is 42, q?", None]
        assert user([0, 1, 2], said) == ["intent of a is 42, q?", None, "intent of c is 42, q?"]
        assert asked == [["a is 42", "b is 42"], ["c is 42"]]


def test_an_error_of_the_early_intents_reaches_the_rollout():
    def summarize(pairs):
        raise act.HelperError("no more")

    user = act.user_for([a_pair("a")], act.Helpers(None, summarize, None, None, early_intents=True))
    with pytest.raises(act.HelperError, match="no more"):
        user([0], [[("model", "q?")]])


def test_evaluated_turns_with_a_failed_helper_are_counted_and_left_out():
    pairs = [a_pair("a"), a_pair("b"), a_pair("c", ANSWER), a_pair("d", ANSWER)]
    played = [
        (pairs[0].gold, (CLARIFY, ANSWER)),  # all right
        (pairs[1].gold[:1], (CLARIFY, None)),  # the user said nothing
        ([("model", "wrong")], (ANSWER, ANSWER)),
        (pairs[3].gold, (None, None)),  # right, but nobody knows whether it is an answer
    ]
    samples = [act.judge(pair, *result, data.exact_match) for pair, result in zip(pairs, played, strict=True)]
    metrics = act.summarize(samples)
    assert [sample["inferred_action"] for sample in samples] == [CLARIFY, None, ANSWER, None]
    assert metrics["Helper Failures"] == 2 and metrics["Trajectory-level Turns"] == 2 and metrics["Turn-Level Turns"] == 2
    assert metrics["Trajectory-level Exact Match"] == 0.5 and metrics["Accuracy"] == 1.0 and metrics["Post-Clarification Turns"] == 1
    assert act.summarize(samples[1:2])["Trajectory-level Exact Match"] is None


# ---------------------------------------------------------------------------------------------------------------------------------
# Roles: prompts, and what is read from answers

PAIR = Pair(
    "", [("user", "Who won in 2018?"), ("model", "Ada."), ("user", "How many\npoints?")], CLARIFY,
    [("model", "In which league?"), ("user", "The second."), ("model", "1,234 points")], [("model", "7")],
    [("model", "In which league?"), ("user", "The second."), ("model", "1,234 points")], "1,234 points", data.INSTRUCTION, {},
)  # fmt: skip


def test_action_prompt_shows_both_actions_and_ends_with_the_response_on_one_line():
    prompt = act.action_prompt("Do you {mean}\nthe league?")
    assert prompt.endswith("\n\nMessage: Do you {mean} the league?\nAction:")
    assert prompt.count("\nAction: CLARIFY\n") >= 2 and prompt.count("\nAction: ANSWER\n") >= 2


def test_intent_prompt_has_the_gold_conversation_without_its_final_answer():
    prompt = act.intent_prompt(PAIR)
    conversation = "User: Who won in 2018?\nAssistant: Ada.\nUser: How many points?\nAssistant: In which league?\nUser: The second.\n"
    assert prompt.endswith(f"\n\nConversation:\n{conversation}Intent:") and "1,234" not in prompt
    assert prompt.count("\nIntent: The user wants to know ") >= 2


def test_user_prompt_has_intent_and_conversation_and_asks_for_the_users_line():
    prompt = act.user_prompt((PAIR.history + [("model", "Which {league}?")], "The user wants\nleague {two}."))
    conversation = "User: Who won in 2018?\nAssistant: Ada.\nUser: How many points?\nAssistant: Which {league}?\n"
    assert prompt.endswith(f"\n\nIntent: The user wants league {{two}}.\nConversation:\n{conversation}User:")
    assert f"\nUser: {act.NOTHING_TO_ADD}\n" in prompt and "{nothing}" not in prompt


def test_no_role_hears_the_final_answer_before_the_policy_gives_it(server, configured):
    """Summariser and user see the gold trajectory without its end, so nothing that they write can give it away."""
    server.answer = lambda prompt: "The user wants points in the second league."
    helpers = helpers_of(configured)
    [intent] = helpers.summarize_intents([PAIR])
    helpers.simulate_users([(PAIR.history + PAIR.gold[:1], intent)])
    assert len(server.requests) == 2 and "1,234" not in json.dumps([body for _, _, body in server.requests])
    assert "1,234" not in act.rule_intents([PAIR])[0] and "The second." in act.rule_intents([PAIR])[0]


def test_question_prompt_is_that_of_the_data_with_the_task_in_front(server, configured):
    server.answer = lambda prompt: "Assistant: Which year?\nUser: 2019"
    helpers, row = helpers_of(configured), json.loads((ROOT / "configs/tiny/train.jsonl").read_text().splitlines()[0])
    other = {"messages": data.exchange("Who?", "Whom {do} you mean?", clarify=True) + data.exchange("Ada", "She.")}
    records = data.ACTDataset([row, other], CLARIFY, 2, helpers.write_questions).prepare_datasets()
    assert {record["rejected"] for record in records if record["dialogue_policy"] == ANSWER} == {"Assistant: Which year?\n"}
    prompts = [body["contents"][0]["parts"][0]["text"] for _, _, body in server.requests]
    assert prompts and all(prompt.endswith(f"\n{data.ASKING}") and prompt.count(data.ASKING) in (2, 3) for prompt in prompts)
    assert any("Assistant (asks a clarifying question): Whom {do} you mean?\n\n" in prompt for prompt in prompts)


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        ("CLARIFY", CLARIFY), (" ANSWER\n", ANSWER), ("**CLARIFY**", CLARIFY), ("_ANSWER_", ANSWER), ("clarify.", CLARIFY),
        ("Answer", ANSWER), ("Action: CLARIFY", CLARIFY), ("Answer: CLARIFY", CLARIFY), ("Answer: clarify", CLARIFY),
        ("The answer is CLARIFY", CLARIFY),
        ("ANSWER\n\nMessage: Which?\nAction: CLARIFY", ANSWER), ("No clarification: it answers", ANSWER), ("CLARIFYING", CLARIFY),
        ("", None), ("yes", None), ("unanswered", None), ("Klären", None), ("?", None),
    ],
)  # fmt: skip
def test_action_is_read_from(answer, action):
    assert act.parse_action(answer) == action


@pytest.mark.parametrize(
    ("answer", "intent"),
    [
        (" The user wants A.", "The user wants A."), ("Intent: The user\nwants A.", "The user wants A."),
        ("Here is the summary:\n\nThe user wants A.\n\nMore talk.", "The user wants A."),
        ("The user wants A.\n\nConversation:\nUser: hi\n", "The user wants A."), ("The user wants A.\nUser: hi", "The user wants A."),
        ("**Intent:** The user wants A: all.", "The user wants A: all."), ("Here it is:", None), ("\n", None), ("Intent:", None),
    ],
)  # fmt: skip
def test_intent_is_read_from(answer, intent):
    assert act.parse_intent(answer) == intent


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (" 2019", "2019"), ("\n2019\n", "2019"), ("User: 2019", "2019"), ("User:\n2019", "2019"), ("**User:** 2019", "2019"),
        ("2019\nAssistant: 42", "2019"), ("2019 Assistant: 42", "2019"), ("2019\nUser: 2020", "2019"), ("-5", "-5"),
        ("User fees", "User fees"), ("Assistant: Which?", None), ("", None), ("User:", None), (" \n", None),
    ],
)  # fmt: skip
def test_users_reply_is_read_from(answer, reply):
    assert act.parse_user(answer) == reply


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("Which year?", "Which year?"), ("Assistant: Which year?", "Which year?"), (f"{data.ASKING} Which year?", "Which year?"),
        ("**Assistant:** Which year?\nUser: 2019", "Which year?"), ("Sure, here it is:\n\nAssistant: Which year?", "Which year?"),
        ("Which year?\nWhich month?", "Which year?"), ("It was 42.", None),
        ("It was 42.\n\nUser: And then?", None), ("Which year", None), ("", None),
    ],
)  # fmt: skip
def test_question_is_read_from_and_no_question_mark_is_made_up(answer, question):
    assert act.parse_question(answer) == question


def test_what_cannot_be_read_is_counted_and_becomes_nothing(server, configured):
    server.answer = lambda prompt: "Assistant: hm" if prompt.endswith("User:") else ":"
    helpers, request = helpers_of(configured), {"prompt": data.ASKING}
    assert helpers.classify_actions(["a", "b"]) == [None, None] and helpers.summarize_intents([PAIR]) == [None]
    assert helpers.simulate_users([(PAIR.history, "intent"), (PAIR.history, None)]) == [None, None]
    assert helpers.write_questions([request]) == [""]
    assert counts(asked=5, unusable=5), "a user without an intent is not asked at all"
    server.script = ["blocked prompt"]
    assert helpers_of(configured, temperature=1.0).write_questions([request]) == [""] and act.HELPER_COUNTS["blocked"] == 1


def test_gold_actions_fall_back_to_the_rule():
    assert act.gold_actions(lambda texts: [None, None, ANSWER])(["Who?", "He.", "Why?"]) == [CLARIFY, ANSWER, ANSWER]


# ---------------------------------------------------------------------------------------------------------------------------------
# A local Gemma, and who plays which role


@pytest.fixture(scope="module")
def gemma_directory(tmp_path_factory):
    """A random model with the tiny world's vocabulary and tokenizer."""
    directory = tmp_path_factory.mktemp("gemma")
    tokenizer = ROOT / "configs/tiny/tokenizer.model"
    config = Gemma2Config(
        vocab_size=len(Tokenizer(tokenizer)), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=32, max_position_embeddings=512,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    )  # fmt: skip
    model, generator = Gemma2(config), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # the layers outweigh the embedding, lest it repeat its last token
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.1 if "embed" in name else 0.5) + 2.0 * ("norm" in name))
    model.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return directory


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_gemma_answers_each_prompt_alike_in_any_batch(gemma_directory, temperature):
    model, tokenizer = Gemma2.from_pretrained(gemma_directory), Tokenizer(gemma_directory / "tokenizer.model")
    prompts = [f"get revenue {'mar ' * i}{word}" for i, word in enumerate(["rome", "oslo", "item", "month", "place", "which"])]

    def ask(prompts, batch_size):
        config = act.HelperConfig(temperature=temperature, max_new_tokens=12, batch_size=batch_size)
        return act.gemma_asker(model, tokenizer, config)(prompts)

    answers = ask(prompts, 6)
    assert len(set(answers)) > 2, "the model tells them apart"
    assert ask(prompts, 2) == answers and ask(prompts[::-1], 4) == answers[::-1]
    assert [ask([prompt], 1)[0] for prompt in prompts] == answers
    assert ask([prompts[0], prompts[0]], 6) == [answers[0]] * 2
    assert act.HELPER_COUNTS["asked"] == 6 * 4 + 1


@pytest.mark.parametrize("end_of_turn", [True, False])
def test_gemma_is_asked_in_its_chat_template_and_long_prompts_lose_their_head(monkeypatch, gemma_directory, end_of_turn):
    model, tokenizer, seen = Gemma2.from_pretrained(gemma_directory), Tokenizer(gemma_directory / "tokenizer.model"), []
    if not end_of_turn:
        tokenizer.end_of_turn_id = tokenizer.start_of_turn_id = None

    def generate(model, prompts, *_, stop_ids, **__):
        seen.append((prompts, stop_ids))
        return [[] for _ in prompts]

    monkeypatch.setattr(act, "generate", generate)
    assert act.gemma_asker(model, tokenizer, act.HelperConfig(max_new_tokens=12))(["which", "which " * 600]) == [None, None]
    [([short, long], stop)] = seen
    encode = tokenizer.encode
    if end_of_turn:
        assert short == [2, 4, *encode("user\n"), *encode("which"), 5, *encode("\n"), 4, *encode("model\n")] and stop == {1, 5}
    else:
        assert short == [2, *encode("which")] and stop == {1, encode("\n")[-1]}
    assert len(long) == 512 - 12 and act.HELPER_COUNTS["blocked"] == 2


def test_roles_that_name_one_checkpoint_share_it(monkeypatch, gemma_directory):
    loaded, load = [], act.load_helper
    monkeypatch.setattr(act, "load_helper", lambda config, path: loaded.append(path) or load(config, path))
    local = act.HelperConfig(backend="gemma", model_path=str(gemma_directory), max_new_tokens=3)
    shared = replace(local, model_path="reference")
    config = replace(Config(), action_model_config=local, intent_model_config=local)
    config = replace(config, user_simulator_config=shared, preference_model_config=shared)
    referred = []
    helpers = act.build_helpers(config, lambda: referred.append(1) or load(config, str(gemma_directory)))
    assert loaded == [str(gemma_directory)] and referred == [1] and not helpers.early_intents
    assert len(helpers.classify_actions(["a", "b"])) == 2 and len(helpers.simulate_users([(PAIR.history, "x")])) == 1
    helpers = act.build_helpers(replace(config, policy_model_config=PolicyModelConfig(str(gemma_directory))))
    assert loaded[1:] == ["reference", str(gemma_directory)], "without a reference at hand, its file is read"


def test_a_model_id_means_gemini_and_nothing_means_rule(configured):
    assert [act.backend_of(act.HelperConfig(**fields)) for fields in ({}, {"model_id": "g"}, {"backend": "rule", "model_id": "g"})] == [
        "rule", "gemini", "rule",
    ]  # fmt: skip
    rules = act.build_helpers(replace(Config(), **{role: act.HelperConfig() for role in act.ROLES}))
    assert rules.classify_actions(["Who?", "He."]) == [CLARIFY, ANSWER] and not rules.early_intents
    [intent], asked = rules.summarize_intents([PAIR]), PAIR.history + PAIR.gold[:1]
    assert rules.simulate_users([(asked, intent), (asked, None)]) == ["The second.", None]
    assert helpers_of(configured).early_intents


@pytest.mark.parametrize(("backend", "key"), [("gemma", "model_path"), ("gemini", "model_id")])
def test_a_back_end_without_its_model_is_an_error_that_names_the_key(backend, key):
    roles = {role: act.HelperConfig() for role in act.ROLES}
    with pytest.raises(InputError, match=f"^user_simulator_config.{key} is missing, backend '{backend}' needs it$"):
        act.build_helpers(replace(Config(), **{**roles, "user_simulator_config": act.HelperConfig(backend=backend)}))


# ---------------------------------------------------------------------------------------------------------------------------------
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
        except act.HelperError as error:
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

    assert on_ranks(monkeypatch, 3, lambda rank: act.split_over_ranks("asking", answer)(list("abcdefg"))) == [list("ABCDEFG")] * 3
    assert sorted(asked) == list("abcdefg")


def test_a_helper_that_gives_up_on_one_rank_stops_all(monkeypatch):
    def work(rank):
        if rank == 1:
            raise act.HelperError("rank 1 is refused")
        return "fine"

    errors = on_ranks(monkeypatch, 3, lambda rank: act.together(lambda: work(rank)))
    assert [str(error) for error in errors] == ["rank 1 is refused"] * 3
    assert on_ranks(monkeypatch, 3, lambda rank: act.together(lambda: rank)) == [0, 1, 2]
