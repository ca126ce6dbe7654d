"""A function in segments has the values of the whole, and products run as early as they can."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Primitive

from moe_jax.serving.segments import segments_of, without_notes

HOST, NOTE = Primitive("host"), Primitive("note")
HOST.def_abstract_eval(lambda x: x)
NOTE.def_abstract_eval(lambda x, noted: x)


def whole(x, w):
    beside = jnp.tanh(x @ w)  # no mark needs it
    first = HOST.bind(NOTE.bind(x + 1, x * 5))
    second = HOST.bind(first * 2)
    return second + beside, x.sum()


def names(segment):
    return [each.primitive.name for each in segment.jaxpr.eqns]


def test_segments_give_the_values_of_the_whole():
    x, w = np.arange(6.0, dtype=np.float32).reshape(2, 3), np.eye(3, dtype=np.float32)
    traced = jax.make_jaxpr(whole)(x, w).jaxpr
    plain = without_notes(traced, HOST, NOTE)
    segments = segments_of(plain, HOST)
    # The product is in the first segment, its tanh with the sum that reads it in the last one.
    assert [names(each) for each in segments[1:]] == [["mul"], ["tanh", "add"]]
    assert {"dot_general", "reduce_sum"} < {*names(segments[0])}
    values, noted = dict(zip(plain.invars, (x, w), strict=True)), []
    for segment in segments:
        found = segment(*(values[each] for each in segment.jaxpr.invars))
        values |= zip(segment.jaxpr.outvars, found, strict=True)
        if segment.mark is not None:
            own, *notes = (values[each] for each in segment.mark.invars)
            noted.append(notes)
            values[segment.mark.outvars[0]] = own + 10
    y, total = (each.val if isinstance(each, Literal) else values[each] for each in plain.outvars)
    np.testing.assert_allclose(y, ((x + 1 + 10) * 2 + 10) + np.tanh(x))
    assert total == 15
    assert len(noted) == 2 and noted[1] == []
    np.testing.assert_array_equal(noted[0][0], x * 5)


def test_equations_that_nothing_reads_are_left_out():
    traced = jax.make_jaxpr(lambda x: HOST.bind(x) + 0 * jnp.ones(2).sum())(jnp.ones(2)).jaxpr
    unread = jax.make_jaxpr(lambda x: (jnp.sin(x), HOST.bind(x))[1])(jnp.ones(2)).jaxpr
    assert [names(each) for each in segments_of(unread, HOST)] == [[], []]
    assert len(segments_of(traced, HOST)) == 2
