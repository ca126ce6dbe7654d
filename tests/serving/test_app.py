"""The endpoint over loopback: a real server, and OpenAI's client."""

import contextlib
import dataclasses
import json
import random
import socket
import time

import jax
import pytest

from examples import chat_client
from moe_jax import data
from moe_jax.models import Decoder
from moe_jax.monitor import Drift, Overload
from moe_jax.serving import Engine
from moe_jax.serving.asking import Served
from moe_jax.serving.bridge import Bridge
from moe_jax.serving.stream import TrafficRules
from moe_jax.serving.traffic import Traffic, layers_of
from tests.serving.generators import Scripted
from tests.test_decoding import MOE, SMALL

httpx = pytest.importorskip("httpx", reason="openai is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("starlette", reason="pip install 'moe_jax[serve]'")

from moe_jax.serving.app import Limits, make_app  # noqa: E402
from moe_jax.serving.endpoint import Endpoint  # noqa: E402
from moe_jax.serving.server import running  # noqa: E402

BYTES = data.Bytes()
HELLO = [{"role": "user", "content": "hello"}]


class Site:
    """A running endpoint with its parts."""

    def __init__(self, generator, bridge, server, key):
        self.generator, self.bridge, self.server = generator, bridge, server
        self.url = url = server.url
        self.http = httpx.Client(base_url=url, timeout=30)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    def post(self, path="/v1/completions", **body):
        return self.http.post(path, json=body)

    def until(self, condition):
        for _ in range(2000):
            if condition():
                return
            time.sleep(0.005)
        raise AssertionError("the endpoint has not come to this")

    def is_idle(self):
        return not (self.bridge.open or self.generator.requests)


@contextlib.contextmanager
def site(text="été 😀", context=400, most=8, generator=None, **limits):
    generator = generator or Scripted(BYTES.encode(text).tolist())
    bridge = Bridge(generator, most)
    served = Served("tiny", BYTES, BYTES.vocab_size, context)
    app = make_app(served, bridge, Limits(**limits))
    with running(app, "127.0.0.1", 0, most) as server:
        found = Site(generator, bridge, server, limits.get("api_key", "none"))
        with found.http, found.openai:
            yield found


@pytest.fixture(scope="module")
def shared():
    with site() as found:
        yield found


def test_a_completion_has_text_reason_and_numbers(shared):
    found = shared.openai.completions.create(model="tiny", prompt="ab", max_tokens=7)
    assert found.object == "text_completion" and found.model == "tiny"
    # é is two bytes; the seventh byte begins a character that does not end.
    assert found.choices[0].text == "été \ufffd"
    assert found.choices[0].finish_reason == "length" and found.choices[0].logprobs is None
    # The begin token and two bytes, and seven tokens.
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 7)
    assert shared.generator.seen[-1].prompt == (1, *BYTES.encode("ab").tolist())


def test_sampling_comes_to_the_generator(shared):
    shared.post(prompt=[5, 7], max_tokens=2, temperature=0.5, top_p=0.25, seed=9, top_k=3)
    request = shared.generator.seen[-1]
    sampling = request.sampling
    assert request.prompt == (5, 7)
    assert (sampling.tokens, sampling.temperature, sampling.top_p) == (2, 0.5, 0.25)
    assert (sampling.seed, sampling.top_k, sampling.eos_ids) == (9, 3, (BYTES.eos_id,))
    shared.post(prompt=[5])
    assert shared.generator.seen[-1].sampling.tokens == 16


def test_a_stream_is_the_answer_in_whole_characters(shared):
    options = {"include_usage": True}
    ask = shared.openai.chat.completions.create
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 10}
    chunks = [*ask(stream=True, stream_options=options, **asked)]
    texts = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert texts == ["", "é", "t", "é", " ", "😀"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 5 + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 10
    assert len({chunk.id for chunk in chunks}) == 1
    whole = ask(**asked)
    assert whole.choices[0].message.content == "".join(texts)
    assert whole.usage == chunks[-1].usage


def test_the_example_of_a_client_reads_the_stream(shared):
    assert "".join(chat_client.answer(shared.url, HELLO, max_tokens=10)) == "été 😀"
    with pytest.raises(RuntimeError, match="temperature must be a number"):
        next(chat_client.answer(shared.url, HELLO, temperature=3))


def test_a_stop_text_ends_the_request_in_the_generator_too(shared):
    found = shared.openai.completions.create(
        model="tiny", prompt="a", max_tokens=300, stop=["é 😀é"]
    )
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("ét", "stop")
    # é, t, é, the space, 😀 and é are 2 + 1 + 2 + 1 + 4 + 2 tokens.
    assert found.usage.completion_tokens == 12
    shared.until(shared.is_idle)


def test_log_probabilities_are_in_both_forms(shared):
    found = shared.openai.completions.create(model="tiny", prompt="a", max_tokens=3, logprobs=1)
    logprobs = found.choices[0].logprobs
    assert logprobs.tokens == ["<0xC3>", "<0xA9>", "t"]
    assert logprobs.token_logprobs == [-0.5] * 3 and logprobs.text_offset == [0, 0, 1]
    assert logprobs.top_logprobs[2] == {"t": -0.5}
    found = shared.openai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=1
    )
    (_, _, last) = found.choices[0].logprobs.content
    assert (last.token, last.logprob, last.top_logprobs[0].token) == ("t", -0.5, "t")


def test_a_chat_without_a_template_has_a_line_for_each_role(shared):
    shared.openai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    request = shared.generator.seen[-1]
    assert BYTES.decode(request.prompt[1:]) == "<|user|>\nhello\n<|assistant|>\n"
    shared.post("/v1/chat/completions", messages=HELLO, stop="t")
    # A chat without max_tokens may fill the context.
    request = shared.generator.seen[-1]
    assert len(request.prompt) + request.sampling.tokens == 400


def test_models_health_load_metrics_and_the_page(shared):
    (model,) = shared.openai.models.list().data
    assert model.id == "tiny" == shared.openai.models.retrieve("tiny").id
    assert shared.http.get("/health").json() == {"status": "ok"}
    assert shared.http.get("/load").json()["layers"] == [[3, 1], [0, 4]]
    text = shared.http.get("/metrics").text
    assert 'moe_jax_responses_total{path="/health",status="200"}' in text
    assert "moe_jax_running_requests 0.0" in text and "moe_jax_first_token_seconds_bucket" in text
    assert "moe_jax_proposed_drafts 8.0" in text and "moe_jax_accepted_drafts 6.0" in text
    assert "moe_jax_expert_hit_rate 0.75" in text and "moe_jax_expert_bytes_moved 96.0" in text
    assert "moe_jax_expert_prediction_accuracy 0.75" in text
    assert "moe_jax_tokens_per_step 1.5" in text
    page = shared.http.get("/")
    assert "<h1>tiny</h1>" in page.text and "http" not in page.text.partition("<body>")[2]
    assert page.headers["content-security-policy"].startswith("default-src 'none'")


def test_alarms_of_the_stream_are_said_and_shown():
    config = dataclasses.replace(SMALL, num_layers=1, moe=dataclasses.replace(MOE, every=1))
    model, said = Decoder(config, BYTES.vocab_size, jax.random.key(1)), []
    rules = TrafficRules([Drift(above=0.3), Overload(above=8)], {"": None}, 64, said.append)
    traffic = Traffic(rules, layers_of(model))
    engine = Engine(model, slots=2, length=40, prefill=8, page=4, traffic=traffic)
    with site(generator=engine, context=40) as one:

        def served(text, tokens):
            for i in range(4):  # Pages of an earlier prompt would not be read again.
                prompt = text[i:] + text[:i]
                assert one.post(prompt=prompt, max_tokens=1).status_code == 200
            traffic.wait()
            one.until(lambda: one.http.get("/load").json()["judged_tokens"] >= tokens)
            return one.http.get("/load").json(), one.http.get("/metrics").text

        found, text = served("abcdefghijklmnop", 64)
        assert (found["alarms"], found["active_alarms"], found["drift"]) == ({}, 0, None)
        assert 'moe_jax_active_alarms{alarm="Drift"} 0.0' in text and "drift_distance" not in text
        found, text = served("ABCDEFGHIJKLMNOP", 128)
        assert found["drift"]["drifted"] == "data" and "all" in found["alarms"]["Drift"]
        number = len(found["alarms"]["Drift"])
        assert f'moe_jax_active_alarms{{alarm="Drift"}} {number}.0' in text
        assert 'moe_jax_active_alarms{alarm="Overload"} 0.0' in text
        assert f'moe_jax_drift_distance{{of="data"}} {found["drift"]["tokens"]}' in text
        assert said[0].startswith("Drift in layer all: the token ids are at a distance of 0.")
        assert said[0].endswith(": drift of the data") and len(said) == number


JSON = {"content-type": "application/json"}
REFUSED = {
    "path": ("GET", "/v2", {}, 404, "no such path"),
    "method": ("GET", "/v1/completions", {}, 405, "another method"),
    "type": ("POST", "/v1/completions", {"content": "{}"}, 415, "Content-Type"),
    "json": ("POST", "/v1/completions", {"content": "{", "headers": JSON}, 400, "not JSON"),
    "utf8": ("POST", "/v1/completions", {"content": b'"\xff', "headers": JSON}, 400, "not UTF-8"),
    "model": ("POST", "/v1/completions", {"json": {"prompt": "", "model": "x"}}, 404, "use 'tiny'"),
    "no model": ("GET", "/v1/models/x", {}, 404, "use 'tiny'"),
    "long": (
        "POST",
        "/v1/completions",
        {"json": {"prompt": "a" * 400}},
        400,
        "has 401 tokens and max_tokens is 1, and the model reads 400",
    ),
    "much": ("POST", "/v1/completions", {"json": {"prompt": "", "max_tokens": 400}}, 400, "reads"),
    "zero": ("POST", "/v1/completions", {"json": {"prompt": "", "max_tokens": 0}}, 400, "from 1"),
    "id": ("POST", "/v1/completions", {"json": {"prompt": [259]}}, 400, "from 0 to 258"),
    "huge": ("POST", "/v1/completions", {"json": {"prompt": "a" * 2**21}}, 413, "1048576 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request_gets_a_status_and_a_line(shared, case):
    method, path, content, status, line = REFUSED[case]
    response = shared.http.request(method, path, **content)
    error = response.json()["error"]
    assert response.status_code == status and line in error["message"]
    assert {*error} == {"message", "type", "param", "code"} and "\n" not in error["message"]


def test_openai_s_client_raises_its_own_errors(shared):
    with pytest.raises(openai.BadRequestError, match="n must be 1") as found:
        shared.openai.completions.create(model="tiny", prompt="a", n=2)
    assert found.value.param == "n"


def mistake(rng, i):
    """A bad request: arguments of httpx, and the statuses that may answer it."""
    path = rng.choice(["/v1/completions", "/v1/chat/completions"])
    good = json.dumps({"prompt": "a", "messages": HELLO, "max_tokens": 4}).encode()
    contents = [
        good[: rng.randrange(1, len(good))],
        rng.randbytes(rng.randrange(1, 200)),
        json.dumps({"prompt": "a" * rng.randrange(500, 5000)}).encode(),
        b'{"prompt": "a", "max_tokens": 0}',
        b'{"prompt": "a", "messages": [{}], "n": ' + str(rng.randrange(2, 10**6)).encode() + b"}",
        b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}',
        b"[" * rng.randrange(1, 50_000),
        b"null",
        b'{"prompt": {"a": [1e999]}, "messages": 5}',
    ]
    return path, contents[i % len(contents)]


def test_the_server_is_healthy_after_500_bad_requests(shared):
    rng = random.Random(0)
    for i in range(500):
        path, content = mistake(rng, i)
        response = shared.http.post(path, content=content, headers=JSON)
        assert response.status_code == 400, content[:80]
        assert response.json()["error"]["message"]
    assert shared.http.get("/health").json() == {"status": "ok"} and shared.is_idle()
    assert shared.post(prompt="a", max_tokens=3).json()["choices"][0]["text"] == "ét"


def test_bytes_that_are_no_http_end_no_server(shared):
    address = ("127.0.0.1", shared.http.base_url.port)
    for content in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n",
    ):
        with socket.create_connection(address) as raw:
            raw.sendall(content)
    assert shared.http.get("/health").status_code == 200


def test_an_idle_connection_outlives_that_of_clients(shared):
    # httpx drops idle connections after 5 seconds. A server that closes first may lose a request.
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", shared.http.base_url.port), timeout=30) as raw:
        for seconds in (0, 6):
            time.sleep(seconds)
            raw.sendall(get)
            content = raw.recv(4096)
            while content and not content.endswith(b'{"status":"ok"}'):
                content += raw.recv(4096)
            assert content.startswith(b"HTTP/1.1 200")


def raw_request(one, **body):
    """A connection that has sent a request, for clients that behave badly."""
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    raw = socket.create_connection(("127.0.0.1", one.http.base_url.port), timeout=30)
    raw.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
    return raw


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("killed", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream, killed):
    with site(context=10**6) as one:
        for number in range(1, 4):
            raw = raw_request(one, prompt="a", max_tokens=10**5, stream=stream)
            one.until(lambda number=number: number in one.generator.requests)
            if stream:
                assert raw.recv(64).startswith(b"HTTP/1.1 200")
            if killed:  # A killed process leaves a reset.
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raw.close()
        one.until(one.is_idle)
        text = one.http.get("/metrics").text
        assert 'moe_jax_answers_total{reason="cancelled"} 3.0' in text
        assert one.post(prompt="a", max_tokens=3).json()["choices"][0]["text"] == "ét"


def test_a_full_queue_is_429_and_a_draining_server_503():
    with site(most=2) as one:
        one.generator.gate.clear()
        # The first step does not end, so that the second request waits for its number.
        with raw_request(one, prompt="a"), raw_request(one, prompt="a", stream=True) as raw:
            one.until(lambda: one.bridge.open == 2)
            with pytest.raises(openai.RateLimitError, match="2 requests wait or run already"):
                one.openai.completions.create(model="tiny", prompt="a")
            one.bridge.draining = True
            response = one.post(prompt="a")
            assert response.status_code == 503 and response.headers["retry-after"] == "1"
            assert one.http.get("/health").status_code == 503
            one.generator.gate.set()
            # Requests from before the end get their answers.
            assert b"[DONE]" in _all(raw)
        one.until(one.is_idle)


def test_draining_waits_for_answers_and_then_ends_them():
    with site(context=10**6) as one:
        draining = Endpoint(one.server, one.bridge)
        with raw_request(one, prompt="a", max_tokens=20, stream=True) as raw:
            one.until(lambda: one.bridge.open)
            assert draining.drain(60) == 0 and b"[DONE]" in _all(raw)
        one.bridge.draining = False
        with raw_request(one, prompt="a", max_tokens=10**5, stream=True) as raw:
            one.until(lambda: one.bridge.open)
            assert draining.drain(0) == 1
            assert b"the server has ended first" in _all(raw)
        one.until(one.is_idle)


def _all(raw):
    content = b""
    while not any(end in content for end in (b"[DONE]", b"error")) and (more := raw.recv(4096)):
        content += more
    return content


class Failing(Scripted):
    """A generator that fails at its third step."""

    steps = 0

    def step(self):
        self.steps += 1
        if self.steps == 3:
            raise FloatingPointError("no memory")
        return super().step()


def test_a_generator_that_fails_ends_answers_and_health():
    with site(generator=Failing([70])) as one:
        with pytest.raises(openai.APIError, match="the model has failed"):
            [*one.openai.completions.create(model="tiny", prompt="a", stream=True)]
        assert isinstance(one.bridge.failed, FloatingPointError)
        assert one.http.get("/health").status_code == 503
        assert one.post(prompt="a").status_code == 503
        assert one.http.get("/load").json()["layers"] is None


def test_a_key_opens_all_but_health_and_the_page():
    with site(api_key="secret-é") as one:
        assert one.http.get("/health").status_code == one.http.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/load"):
            response = one.http.get(path)
            assert response.status_code == 401 and "Bearer KEY" in response.text
        wrong = {"authorization": "Bearer secret"}
        assert one.http.get("/v1/models", headers=wrong).status_code == 401
        right = {"authorization": "Bearer secret-é".encode()}
        assert one.http.get("/v1/models", headers=right).status_code == 200


def test_a_slow_body_is_408():
    with site(seconds=0.1) as one:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        raw = socket.create_connection(("127.0.0.1", one.http.base_url.port))
        raw.sendall(head + b"Content-Length: 9\r\n\r\n{")
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        raw.close()
