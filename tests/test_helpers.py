"""Helper models: Gemini's REST API played by a local server that misbehaves, a local Gemma, who plays which role."""

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
from types import SimpleNamespace

import pytest
import torch

import act
import data
from act import Config, PolicyModelConfig
from data import ANSWER, CLARIFY, ROLES, InputError, Pair
from gemma import Gemma, GemmaConfig, Tokenizer

ROOT = Path(__file__).parent.parent
KEY = "AIza-not-a-real-key_0123456789"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """A key, no proxy before the local server, waits that a test can sit out, counters at zero, one thread."""
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(act, "FIRST_WAIT", 0.01)
    act.HELPER_COUNTS.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------------------
# A server in Gemini's place


def reply_with(text, **candidate):
    content = {"role": "model", "parts": [{"text": text}]}
    return {"candidates": [{"content": content, "finishReason": "STOP", **candidate}]}


def failure_with(message, **error):
    return {"error": {"message": message, **error}}


RETRY_INFO = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}]
ECHO = f"API key {KEY} is not valid.\nPass a valid one."  # some servers put the key into what they say
THOUGHT = {"text": "hm", "thought": True}
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
    "all thought": (200, {}, reply_with("", finishReason="MAX_TOKENS", content={"parts": [THOUGHT]})),
    "MAX_TOKENS": (200, {}, reply_with("cut off", finishReason="MAX_TOKENS")),
    "parts": (200, {}, reply_with("", content={"parts": [THOUGHT, {"text": "two "}, {"text": "parts"}]})),
    "half a character": (200, {}, reply_with("odd \ud83d end")),
    "key in the answer": (200, {}, reply_with(f"your key is {KEY}")),
    "key in the reason": (200, {}, {"promptFeedback": {"blockReason": KEY}}),
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["contents"][0]["parts"][0]["text"]
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.lock:
            self.server.requests.append((self.path, headers, body))
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
    server.lock, server.over = threading.Lock(), threading.Event()
    server.requests, server.script, server.delay = [], [], 0.0
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
        fields = {"model_id": "gemini-test", "base_url": address, "cache_path": str(tmp_path / "cache.sqlite")}
        return act.HelperConfig(**{**fields, "timeout": 5.0, **changes})

    return make


def counts(**expected):
    """The counters that are not zero."""
    return expected == {name: number for name, number in act.HELPER_COUNTS.items() if number}


def line_of(raised):
    text = str(raised.value)
    assert "\n" not in text and KEY not in text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# What each misbehaviour leads to

AGAIN = (
    "429", "429 with RetryInfo", "429 until a date", "500", "503", "reset", "hang up", "hang", "half an answer",
    "invalid JSON", "not HTTP", "list", "odd candidates",
)  # fmt: skip
EMPTY = (
    "no candidates", "blocked prompt", "SAFETY", "RECITATION", "empty text", "blank text", "all thought",
    "key in the reason",
)  # fmt: skip
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
    client = act.GeminiClient(configured(timeout=0.25 if behaviour == "hang" else 5.0))
    assert client(["p"]) == ["answer to p"]
    assert len(server.requests) == 2 and counts(asked=1, retried=1)


@pytest.mark.parametrize("behaviour", AGAIN)
def test_what_does_not_pass_is_given_up_and_not_stored(monkeypatch, server, configured, behaviour):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    server.script = [behaviour] * 3
    client = act.GeminiClient(configured(timeout=0.25 if behaviour == "hang" else 5.0, max_retries=2))
    assert client(["p"]) == [None]
    assert len(server.requests) == 3 and counts(asked=1, retried=2, failed=1)
    assert client(["p"]) == ["answer to p"], "it was not taken for an answer"


def test_a_refused_connection_is_tried_again_and_given_up(server, configured):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client = act.GeminiClient(configured(base_url=f"http://127.0.0.1:{closed.getsockname()[1]}", max_retries=2))
        assert client(["p"]) == [None]
    assert counts(asked=1, retried=2, failed=1)


@pytest.mark.parametrize("behaviour", EMPTY)
def test_a_blocked_or_empty_answer_is_none_at_once_and_not_stored(server, configured, behaviour):
    server.script = [behaviour]
    client = act.GeminiClient(configured())
    assert client(["p"]) == [None]
    assert len(server.requests) == 1 and counts(asked=1, blocked=1)
    assert client(["p"]) == ["answer to p"]


@pytest.mark.parametrize("behaviour", ANSWERED)
def test_unusual_answers_are_answers(server, configured, behaviour):
    server.script = [behaviour]
    assert act.GeminiClient(configured())(["p"]) == [ANSWERED[behaviour]]
    assert counts(asked=1)


@pytest.mark.parametrize("behaviour", FATAL)
def test_a_refused_request_stops_at_once(server, configured, behaviour):
    server.script = [behaviour] * 3
    client = act.GeminiClient(configured(concurrency=1))
    with pytest.raises(act.HelperError) as raised:
        client(["p", "q", "r"])
    assert line_of(raised) == FATAL[behaviour]
    with pytest.raises(act.HelperError) as raised:
        client(["s"])
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
    client = act.GeminiClient(configured(max_retries=8))
    client.spent.wait = waited.append
    assert client(["p"]) == ["answer to p"]
    assert waited == waits and drawn == [(0, 2**i) for i in range(8)]


def test_failures_in_a_row_stop_the_run_and_a_success_between_them_does_not(server, configured):
    server.script = ["503", "blocked prompt", "good", "503", "empty text", "503", "good"]
    client = act.GeminiClient(configured(concurrency=1, max_retries=0, max_failures=3))
    with pytest.raises(act.HelperError) as raised:
        client(["a", "b", "c", "d", "e", "f", "g"])
    why = "HTTP 503: Service Unavailable"
    assert line_of(raised) == f"3 requests to gemini-test in a row failed, the last one with: {why}"
    assert len(server.requests) == 6 and act.HELPER_COUNTS["failed"] == 3 and act.HELPER_COUNTS["blocked"] == 2
    assert act.GeminiClient(configured())(["c"]) == ["answer to c"]
    assert len(server.requests) == 6, "what was answered before is kept"


def test_after_the_stop_nothing_waits_for_calls_that_would_be_tried_again(monkeypatch, server, configured):
    monkeypatch.setattr(act, "FIRST_WAIT", 30.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    server.script = ["503"] * 7 + ["400"]
    began = time.monotonic()
    with pytest.raises(act.HelperError):
        act.GeminiClient(configured(concurrency=8))([f"{i}" for i in range(8)])
    assert time.monotonic() - began < 5


def test_after_the_stop_nothing_waits_for_calls_in_flight(server, configured):
    server.script, began = ["hang", "400"], time.monotonic()
    with pytest.raises(act.HelperError):
        act.GeminiClient(configured(concurrency=2))(["a", "b"])
    assert time.monotonic() - began < 2.5


# ----------------------------------------------------------------------------------------------------------------------
# The key, the request, the cache, concurrency


def test_the_key_is_nowhere_but_in_its_header(monkeypatch, server, configured, tmp_path, capfd, caplog):
    monkeypatch.setattr(act, "LONGEST_WAIT", 0.01)
    server.script = ["key in the answer", "key in the reason", "not HTTP"]
    errors = []
    for behaviour, prompts in [("good", ["a", "b", "c"]), ("400", ["d"]), ("403", ["e"]), ("key in the reason", ["f"])]:
        server.script.append(behaviour)
        client = act.GeminiClient(configured(concurrency=1, max_retries=1, max_failures=1 if prompts == ["f"] else 20))
        try:
            assert KEY not in repr(client(prompts))
        except act.HelperError as error:
            errors.append(error)
    assert len(errors) == 3
    for error in errors:
        while error:
            assert KEY not in "".join(traceback.format_exception(error)) + repr(error.args)
            error = error.__cause__ or error.__context__
    for path, headers, body in server.requests:
        assert KEY not in path + json.dumps(body) and headers.get("x-goog-api-key") == KEY
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
        act.GeminiClient(configured())
    assert not key or not key.strip() or key not in str(raised.value)


ODD_URLS = "", "example.org", "file:///etc/hosts", "https://", f"https://example.org/?key={KEY}", f"https://{KEY}@a.org"


@pytest.mark.parametrize("url", ODD_URLS)
def test_an_odd_address_is_an_error_that_does_not_repeat_it(configured, url):
    with pytest.raises(InputError, match="^base_url of a helper model: expected http") as raised:
        act.GeminiClient(configured(base_url=url))
    assert KEY not in str(raised.value)


def test_the_request_has_the_documented_form(server, configured):
    act.GeminiClient(configured(temperature=0.5, max_new_tokens=9), ("\nUser:",))(["Grüße 😀"])
    [(path, headers, body)] = server.requests
    assert path == "/v1beta/models/gemini-test:generateContent" and headers["content-type"] == "application/json"
    assert body.pop("contents") == [{"role": "user", "parts": [{"text": "Grüße 😀"}]}]
    sampling = {"temperature": 0.5, "topP": 1.0, "topK": 40, "maxOutputTokens": 9, "stopSequences": ["\nUser:"]}
    assert body.pop("generationConfig") == sampling
    assert {row["threshold"] for row in body.pop("safetySettings")} == {"BLOCK_NONE"} and not body


def test_an_answer_is_paid_once_in_this_process_and_the_next(server, configured):
    config = configured()
    assert act.GeminiClient(config)(["a", "b", "a", "a"]) == [f"answer to {each}" for each in "abaa"]
    assert len(server.requests) == 2 and counts(asked=2)
    assert act.GeminiClient(config)(["b", "a"]) == ["answer to b", "answer to a"] and counts(asked=2, cached=2)
    module = sys.modules[act.GeminiClient.__module__]
    code = """import sys, {} as m
print(m.GeminiClient(m.HelperConfig(model_id='gemini-test', base_url=sys.argv[1], cache_path=sys.argv[2]))(['a']))"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(module.__file__).parent}"}
    command = [sys.executable, "-c", code.format(module.__name__), config.base_url, config.cache_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == "['answer to a']\n", result.stderr
    assert len(server.requests) == 2


def test_another_model_or_another_request_is_another_answer(server, configured):
    others = {"model_id": "gemini-other"}, {"temperature": 0.5}, {"max_new_tokens": 5}
    for changes in ({}, *others, {"concurrency": 2, "timeout": 4.0}):
        act.GeminiClient(configured(**changes))(["a"])
    assert len(server.requests) == 4, "how a call is made does not matter, what is asked does"


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

        def conversations(pairs=pairs):
            return [act.act_pair(pair, lambda text, gold: float(text.strip() == gold), 0.5, 3) for pair in pairs]

        def of_rows(one, pairs=pairs):
            return lambda rows, asked: [one(pairs[row], said) for row, said in zip(rows, asked, strict=True)]

        expected = [
            alone(conversation, respond=lambda said, pair=pair: respond(pair, said), classify=classify,
                  simulate=lambda said, pair=pair: reply(pair, said))
            for pair, conversation in zip(pairs, conversations(), strict=True)
        ]  # fmt: skip
        helpers = of_rows(respond), lambda rows, texts: list(map(classify, texts)), of_rows(reply)
        assert act.in_lockstep(conversations(), *helpers) == expected
        seen.update(result and result[1] for result in expected)
    assert seen == {None, *act.OUTCOMES} - {act.HELPER_FAILED}


def batch_of(monkeypatch, helpers, pairs, respond):
    """`on_policy` for a batch in which respond(pair, trajectory) plays the policy, on one rank."""
    monkeypatch.setattr(act, "all_gathered", list)
    monkeypatch.setattr(act, "unsharded", lambda *_: None)
    training, files = act.TrainingConfig(), act.DataConfig(heuristic="exact_match")

    def sampler(model, template, pairs, training, noise):
        assert len(noise) == len(pairs)
        return lambda rows, asked: [(respond(pairs[row], said), True) for row, said in zip(rows, asked, strict=True)]

    monkeypatch.setattr(act, "Sampler", sampler)
    config = replace(Config(), data_config=files, training_config=training)
    run = SimpleNamespace(config=config, helpers=helpers, policy=None, template=None)
    return act.on_policy(run, pairs, 0, range(len(pairs)))


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
        conversations = [act.act_pair(pair, lambda text, gold: text == gold, 0.5, 3) for pair in pairs]
        results = act.in_lockstep(conversations, respond, helpers.classify, helpers.users_of(pairs))
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
    played = [
        (pairs[0].gold, [CLARIFY, ANSWER], pairs[0].target),  # all right
        None,  # the user said nothing
        ([("model", "wrong")], [ANSWER], "wrong"),
        None,  # nobody knows whether the response is an answer
    ]
    samples = [act.scored_turn(pair, each, data.exact_match) for pair, each in zip(pairs, played, strict=True)]
    assert [sample["inferred_action"] for sample in samples] == [CLARIFY, None, ANSWER, None]
    metrics = act.summarize(samples)
    assert metrics["Helper Failures"] == 2
    assert [metrics[f"{name} Turns"] for name in ("Trajectory-level", "Turn-Level", "Post-Clarification")] == [2, 2, 1]
    assert metrics["Trajectory-level Exact Match"] == 0.5 and metrics["Accuracy"] == 1.0
    assert act.summarize(samples[1:2])["Trajectory-level Exact Match"] is None


def test_gold_actions_fall_back_to_the_rule():
    helpers = act.Helpers(lambda texts: [None, None, ANSWER], None, None, None)
    assert helpers.label_actions(["Who?", "He.", "Why?"]) == [CLARIFY, ANSWER, ANSWER]
    assert helpers.classify([0, 1, 2], ["Who?", "He.", "Why?"]) == [None, None, ANSWER], "the policy's do not"


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
    prompts = [body["contents"][0]["parts"][0]["text"] for _, _, body in server.requests]
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
    assert counts(asked=5, unusable=5)
    server.script = ["blocked prompt"]
    assert helpers_of(configured, temperature=1.0).write_questions([request]) == [None]
    assert act.HELPER_COUNTS["blocked"] == 1 and act.HELPER_COUNTS["unusable"] == 5


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
    assert ask(["which", "which " * 600]) == [None, None]
    [([short, long], stop)] = seen
    encode = tokenizer.encode
    if end_of_turn:
        user, assistant = ([4, *encode(f"{role}\n")] for role in ("user", "model"))
        assert short == [2, *user, *encode("which"), 5, *encode("\n"), *assistant] and stop == {1, 5}
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
    assert loaded == [str(gemma_directory)] and referred == [1] and helpers.cost
    assert len(helpers.classify_actions(["a", "b"])) == 2
    assert len(helpers.simulate_users([(PAIR, PAIR.gold[:1], "x")])) == 1
    act.build_helpers(replace(config, policy_model_config=PolicyModelConfig(str(gemma_directory))))
    assert loaded[1:] == [str(gemma_directory), "reference"], "without a reference at hand, its file is read"


def test_a_model_id_means_gemini_and_nothing_means_rule(configured):
    fields = {}, {"model_id": "g"}, {"backend": "rule", "model_id": "g"}, {"backend": "gemma", "model_id": "g"}
    assert [act.backend_of(act.HelperConfig(**each)) for each in fields] == ["rule", "gemini", "rule", "gemma"]
    rules = act.build_helpers(Config())
    found = rules.classify_actions, rules.summarize_intents, rules.simulate_users, rules.write_questions
    assert found == (data.rule_actions, data.rule_intents, data.rule_users, data.rule_questions) and not rules.cost
    assert rules.users_of([PAIR])([0], [PAIR.gold[:1]]) == ["The second."]
    assert act.build_helpers(replace(Config(), action_model_config=configured())).cost, "one model is enough"


def test_who_makes_files_of_pairs_casts_no_user(configured):
    config = replace(Config(), task="generate_preference", **{role: configured() for role in ROLES})
    helpers = act.build_helpers(config)
    assert (helpers.summarize_intents, helpers.simulate_users) == (data.rule_intents, data.rule_users)
    assert helpers.write_questions != data.rule_questions and helpers.classify_actions != data.rule_actions


@pytest.mark.parametrize(("backend", "key"), [("gemma", "model_path"), ("gemini", "model_id")])
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
    odd = "{response} {conversation} {intent} {examples} {other} \\1 \\g<0>?"
    pair = Pair("", [("user", odd)], CLARIFY, *[[("model", odd), ("user", odd), ("model", "x")]] * 3, "x")
    played, request = {
        "action_model_config": (helpers.classify_actions, odd),
        "user_simulator_config": (helpers.simulate_users, (pair, [("model", odd)], odd)),
        "intent_model_config": (helpers.summarize_intents, pair),
        "preference_model_config": (helpers.write_questions, (pair, [pair])),
    }[name]
    if name == "intent_model_config":  # cast only where the user is no rule
        played = act.build_helpers(replace(Config(), **{name: configured(prompt_path=str(path))},
                                           user_simulator_config=configured())).summarize_intents  # fmt: skip
    played([request])
    [(_, _, body)] = server.requests
    filled = role.fields(request)
    want = " {{x}} {other} " + "\n".join(filled[each] for each in role.names) + "{0}\n"
    assert body["contents"][0]["parts"][0]["text"] == want and odd in want


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
    assert body["contents"][0]["parts"][0]["text"] == shipped.removesuffix("\n").replace("{response}", "Who?")


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
