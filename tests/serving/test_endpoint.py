"""Models behind the endpoint: a folder of transformers, its tokenizer, its template, a signal."""

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax import models
from moe_jax.data import end_ids
from moe_jax.decoding import Sampling, generate
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES, save
from moe_jax.nn.positions import Learned
from moe_jax.run.opened import open_folder
from moe_jax.run.sampling import answer, check_continues, texts
from moe_jax.serving import engines
from tests.data.test_hf_tokenizer import byte_level
from tests.run.test_scoring import expert_choice
from tests.serving.process import engine_of
from tests.system.runs import ROOT, TIMEOUT, environment
from tests.test_face import TINY_MIXTRAL

httpx = pytest.importorskip("httpx", reason="openai is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("starlette", reason="pip install 'moe_jax[serve]'")

from moe_jax.serving import endpoint  # noqa: E402
from moe_jax.serving.app import Limits  # noqa: E402

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
END = 207  # The fourth token that the model samples below; the end token of the tokenizer is 2.
HELLO = [{"role": "user", "content": "é?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "tiny"
    original = {**TINY_MIXTRAL, "vocab_size": 280}
    model = models.make(FAMILIES["mixtral"].read(original), 280, jax.random.key(0))
    save(model, path, "mixtral", original=original)
    byte_level(path, chat_template=TEMPLATE)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, END]}))
    return path


@pytest.fixture(scope="module")
def opened(folder):
    return open_folder(folder, None, check_continues)


@pytest.fixture(scope="module")
def client(opened):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "engine_of", engine_of)
        room = engines.Room(slots=1, queue=4, context=48)
        with (
            endpoint.offered(opened, "tiny", room, Limits(), "127.0.0.1", 0) as found,
            openai.OpenAI(base_url=f"{found.server.url}/v1", api_key="x", max_retries=0) as one,
        ):
            yield one


def test_a_completion_is_what_generate_samples(client, opened):
    prompt = [1, *opened.tokenizer.encode("def f").tolist()]
    sampling = Sampling(6, 0.7, seed=3, eos_id=end_ids(opened.tokenizer))
    (ids,) = generate(opened.model, [prompt], sampling)
    assert len(ids) == 4 and ids[-1] == END
    expected = opened.tokenizer.decode(np.array(ids[:-1]))
    asked = {"model": "tiny", "prompt": "def f", "max_tokens": 6, "temperature": 0.7, "seed": 3}
    found = client.completions.create(**asked).choices[0]
    assert (found.text, found.finish_reason) == (expected, "stop")
    assert texts(opened.model, opened.tokenizer, ["def f"], sampling) == ["def f" + expected]
    parts = client.completions.create(stream=True, **asked)
    assert "".join(part.choices[0].text for part in parts) == expected


def test_a_chat_is_in_the_template_of_the_folder(client, opened):
    expected = answer(opened.model, opened.tokenizer, HELLO, Sampling(6, 0.0))
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    assert found.choices[0].message.content == expected
    first = found.choices[0].logprobs.content[0]
    assert first.logprob == first.top_logprobs[0].logprob > first.top_logprobs[1].logprob
    prompt = opened.tokenizer.encode("[user] é?\n[assistant] ")
    assert found.usage.prompt_tokens == 1 + len(prompt)


def test_messages_that_the_template_rejects_are_400(client):
    with pytest.raises(openai.BadRequestError, match="no system here"):
        messages = [{"role": "system", "content": "be brief"}]
        client.chat.completions.create(model="tiny", messages=messages)


def test_a_context_beyond_the_learned_positions_is_refused(opened):
    config = models.DecoderConfig(positions=Learned(length=16))
    model = dataclasses.make_dataclass("Model", ["config"])(config)
    short = dataclasses.replace(opened, model=model)
    room = engines.Room(context=17)
    offered = endpoint.offered(short, "tiny", room, Limits(), "127.0.0.1", 0)
    with pytest.raises(ConfigError, match="is shorter than --context=17"), offered:
        pass


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (models.EncoderDecoderConfig(), "fills blanks and continues no text"),
        (models.DecoderConfig(causal=False), "generates no text"),
        (expert_choice(), "experts choose among tokens"),
    ],
)
def test_a_model_that_continues_no_text_is_refused(config, reason):
    with pytest.raises(ConfigError, match=reason):
        check_continues(config)


def test_an_address_that_is_taken_is_one_line(client):
    from moe_jax.serving.server import running

    port = client.base_url.port
    with (
        pytest.raises(ConfigError, match=f"--port={port} cannot be bound .*: choose another port"),
        running(None, "127.0.0.1", port, 1),
    ):
        pass


@contextlib.contextmanager
def served(folder, *arguments):
    """A process of the command, and its address."""
    command = [sys.executable, "-m", "tests.serving.process", f"--model={folder}", "--port=0"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        yield process, re.fullmatch(r"tiny is at (http://127\.0\.0\.1:\d+)\n", line)[1]
    finally:
        process.kill()
        process.communicate()


def test_sigterm_ends_the_server_after_its_answers(folder):
    with served(folder, "--context=256") as (process, url), httpx.Client(timeout=TIMEOUT) as http:
        body = {"messages": HELLO, "max_tokens": 200, "stream": True, "temperature": 0}
        path = f"{url}/v1/chat/completions"
        with http.stream("POST", path, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert "1 requests wait or run" in process.stdout.readline()
            assert http.post(path, json=body).status_code == 503
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        reason = json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert reason in ("length", "stop")
        _, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 143 and "stopped by SIGTERM" in err


def test_requests_beyond_the_time_of_draining_end_early(folder):
    arguments = ("--context=4096", "--drain_seconds=0")
    with served(folder, *arguments) as (process, url), httpx.Client(timeout=TIMEOUT) as http:
        body = {"prompt": "a", "max_tokens": 4000, "stream": True}
        with http.stream("POST", f"{url}/v1/completions", json=body):
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 143 and "1 requests end early" in err
