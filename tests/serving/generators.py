"""Generators for tests of the endpoint: an exact one, and one with a script."""

import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.decoding import choose
from moe_jax.errors import ConfigError
from moe_jax.nn.mode import DECODE
from moe_jax.offload import OffloadCounts
from moe_jax.serving.request import Ended, Token
from moe_jax.serving.speculation import Drafts


class _Waiting:
    """Requests in the order in which they came; the first ``slots`` of them run."""

    def __init__(self, slots):
        self.requests, self._slots, self._last = {}, slots, 0

    def submit(self, request):
        self._last += 1
        self.requests[self._last] = (request, [])
        return self._last

    def cancel(self, number):
        self.requests.pop(number, None)

    @property
    def waiting(self):
        return len(self.requests) - self.running

    @property
    def running(self):
        return min(len(self.requests), self._slots)

    def sampled(self, number, token, logprob, top=()):
        """The next token of a request, which ends at its length or at the end token."""
        request, tokens = self.requests[number]
        tokens.append(token)
        ended = Ended.LENGTH if len(tokens) == request.sampling.tokens else None
        ended = Ended.END if token in request.sampling.eos_ids else ended
        if ended:
            del self.requests[number]
        return Token(number, token, logprob, top, ended)


class Scripted(_Waiting):
    """Every answer is ``ids``, over and over; a step takes a millisecond, or waits for the gate."""

    load, drafts = ((3, 1), (0, 4)), Drafts(8, 6, 12, 8)
    offloaded = OffloadCounts(wanted=8, hits=6, loads=3, bytes_moved=96, predicted=4, right=3)

    def __init__(self, ids, slots=2):
        super().__init__(slots)
        self.ids, self.gate, self.seen = tuple(ids), threading.Event(), []
        self.gate.set()

    def submit(self, request):
        self.seen.append(request)
        return super().submit(request)

    def step(self):
        self.gate.wait()
        time.sleep(0.001)
        found = []
        for number in list(self.requests)[: self.running]:
            request, tokens = self.requests[number]
            token = self.ids[len(tokens) % len(self.ids)]
            top = tuple((token, -0.5) for _ in range(min(request.logprobs, 1)))
            found.append(self.sampled(number, token, -0.5, top))
        return found


@jax.jit
def _logits(model, row, last):
    """The float32 logits ``(1, V)`` after token ``last`` of a row ``(1, L)``, without a cache."""
    segments = (jnp.arange(row.shape[1]) <= last).astype(jnp.int32)[None]
    hidden, _ = model.hidden(row, segments, jnp.arange(row.shape[1])[None], mode=DECODE)
    return model.logits(jax.lax.dynamic_slice_in_dim(hidden, last, 1, axis=1))[:, 0]


class OneByOne(_Waiting):
    """One request at a time; every token reads all tokens before it again, without a cache."""

    def __init__(self, model, vocab_size, context):
        super().__init__(slots=1)
        self._model, self._vocab_size, self._context = model, vocab_size, context

    def submit(self, request):
        if len(request.prompt) + request.sampling.tokens > self._context:
            raise ConfigError("prompt and sample do not fit")
        return super().submit(request)

    def step(self):
        number, (request, tokens) = next(iter(self.requests.items()))
        ids = [*request.prompt, *tokens]
        row = np.zeros((1, self._context), np.int32)
        row[0, : len(ids)] = ids
        logits = _logits(self._model, row, len(ids) - 1)
        keys = self._keys(request.sampling.seed, request.sampling.tokens)
        sampling = dataclasses.replace(request.sampling, seed=0)
        token = int(choose(logits, sampling, keys[len(tokens)])[0])
        logprobs = np.asarray(jax.nn.log_softmax(logits))[0].astype(float)
        order = np.argsort(-logprobs, kind="stable")[: request.logprobs]
        top = tuple((int(i), float(logprobs[i])) for i in order)
        return [self.sampled(number, token, float(logprobs[token]), top)]

    @functools.cache  # noqa: B019 - a generator lives as long as its test
    def _keys(self, seed, tokens):
        return jax.random.split(jax.random.key(seed), tokens)
