import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding import Sampling, choose
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.planning.collectives import of_compiled
from moe_jax.training.loss import distil_tokens, score_tokens

BATCH, LENGTH, WIDTH, VOCAB = 2, 6, 3, 5
KERNEL = jax.random.normal(jax.random.key(0), (WIDTH, VOCAB))
HIDDEN = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))
TARGETS = jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, VOCAB)
# Unequal weights, so that a chunk put back in the wrong place changes the gradient.
WEIGHTS = jnp.arange(12.0).reshape(BATCH, LENGTH)


@jax.tree_util.register_pytree_node_class
class Linear:
    """A head that counts how many positions it was shown at a time."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, []

    def logits(self, hidden):
        self.seen.append(hidden.shape[1])
        return hidden @ self.kernel

    def tree_flatten(self):
        return (self.kernel,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_static
class Given:
    """A head whose logits are the hidden states."""

    def logits(self, hidden):
        return hidden


def reference():
    """Values, and gradients of ``sum(WEIGHTS * (nll + log_z ** 2))``, in float64 numpy."""
    kernel, hidden = np.asarray(KERNEL, np.float64), np.asarray(HIDDEN, np.float64)
    logits = hidden @ kernel
    log_z = np.log(np.exp(logits).sum(-1))
    one_hot = np.eye(VOCAB)[np.asarray(TARGETS)]
    softmax = np.exp(logits - log_z[..., None])
    weights = np.asarray(WEIGHTS, np.float64)[..., None]
    by_logits = weights * (softmax - one_hot + 2 * log_z[..., None] * softmax)
    values = (log_z - (logits * one_hot).sum(-1), log_z, logits.argmax(-1) == TARGETS)
    return values, (np.einsum("blm,blv->mv", hidden, by_logits), by_logits @ kernel.T)


# 4 does not divide 6 and counts as 0.
@pytest.mark.parametrize("chunk", [0, 2, 4, 6])
def test_values_and_gradients_are_numpys_in_chunks_of_any_size(chunk):
    def objective(kernel, hidden):
        scored = score_tokens(Linear(kernel), hidden, TARGETS, chunk=chunk)
        return (WEIGHTS * (scored.nll + scored.log_z**2)).sum(), scored

    gradients, scored = jax.grad(objective, (0, 1), has_aux=True)(KERNEL, HIDDEN)
    (nll, log_z, correct), wanted = reference()
    np.testing.assert_allclose(scored.nll, nll, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scored.log_z, log_z, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scored.correct, correct)
    for found, expected in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_on_a_mesh_chunks_are_of_a_devices_length_and_the_head_is_summed_once():
    def objective(kernel, hidden, targets):
        scored = score_tokens(Linear(kernel), hidden, targets, chunk=2)
        return (scored.nll + scored.log_z**2).sum()

    step = jax.jit(jax.value_and_grad(objective, (0, 1)))
    hidden, targets = jnp.tile(HIDDEN, (2, 2, 1)), jnp.tile(TARGETS, (2, 2))
    alone = step(KERNEL, hidden, targets)
    mesh = make_mesh(MeshConfig(2, 2, sequence=2))
    with jax.set_mesh(mesh):
        compiled = step.lower(KERNEL, hidden, targets).compile()
        there = compiled(KERNEL, hidden, targets)
    for found, wanted in zip(jax.tree.leaves(there), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    sums = [one for one in of_compiled(compiled, mesh) if one.kind == "all-reduce"]
    assert sums
    assert all(one.times == 1 for one in sums)


@pytest.mark.parametrize(("chunk", "shown"), [(0, 6), (1, 1), (2, 2), (3, 3), (4, 6), (6, 6)])
def test_only_a_chunk_of_logits_is_made_at_a_time(chunk, shown):
    head = Linear(KERNEL)
    score_tokens(head, HIDDEN, TARGETS, chunk=chunk)
    assert set(head.seen) == {shown}


@pytest.mark.parametrize("chunk", [0, 2])
def test_hand_made_scores(chunk):
    three, five = np.log(3.0), np.log(5.0)
    # Probabilities 3/4 1/4, 1/2 1/2, 1/6 5/6, 1/6 5/6.
    logits = jnp.array([[[three, 0.0], [0.0, 0.0], [0.0, five], [0.0, five]]])
    scored = score_tokens(Given(), logits, jnp.array([[0, 1, 0, 1]]), chunk=chunk)
    expected = [[np.log(4 / 3), np.log(2), np.log(6), np.log(6 / 5)]]
    np.testing.assert_allclose(scored.nll, expected, rtol=1e-6)
    np.testing.assert_allclose(scored.log_z, np.log([[4, 2, 6, 6]]), rtol=1e-6)
    # Greedy decoding takes the first of two equally likely tokens, which is not the target.
    np.testing.assert_array_equal(scored.correct, [[True, False, False, True]])
    assert scored.nll.dtype == scored.log_z.dtype == jnp.float32
    assert scored.correct.dtype == bool


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_target_is_right_where_greedy_decoding_takes_it(chunk):
    above = np.nextafter(np.float32(1), np.float32(2))
    # A near tie is no tie; of equal tokens the decoder takes the first; NaN is no guess.
    rows = [[1.0, above], [1.0, above], [2.0, 2.0], [2.0, 2.0], [np.nan, 0.0], [-np.inf, 0.0]]
    targets = jnp.array([[0, 1, 0, 1, 0, 1]])
    logits = jnp.array([rows], jnp.float32)
    scored = score_tokens(Given(), logits, targets, chunk=chunk)
    np.testing.assert_array_equal(scored.correct, [[False, True, True, False, False, True]])
    greedy = choose(logits[0], Sampling(temperature=0.0), jax.random.key(0))
    known = [0, 1, 2, 3, 5]
    np.testing.assert_array_equal(
        (greedy == targets[0])[jnp.array(known)], scored.correct[0, known]
    )


@pytest.mark.parametrize("chunk", [0, 1])
def test_large_logits_do_not_overflow(chunk):
    logits = jnp.array([[[1e4, 0.0], [-1e4, 0.0]]])
    scored = score_tokens(Given(), logits, jnp.array([[0, 0]]), chunk=chunk)
    np.testing.assert_array_equal(scored.nll, [[0.0, 1e4]])
    np.testing.assert_array_equal(scored.log_z, [[1e4, 0.0]])


# A student that gives 3/4 1/4 and 1/2 1/2, taught 1/3 2/3 and 1/6 5/6.
STUDENT = jnp.array([[[1.0986123, 0.0], [0.0, 0.0]]])
TAUGHT = jnp.array([[[0.0, 0.6931472], [0.0, 1.6094379]]])


@pytest.mark.parametrize("chunk", [0, 1])
def test_hand_made_distillation(chunk):
    def soft(student, taught):
        scored = distil_tokens(
            (Given(), Given()), student, jnp.array([[0, 1]]), taught, chunk=chunk
        )
        return scored.distillation.sum(), scored

    (by_student, by_taught), scored = jax.grad(soft, (0, 1), has_aux=True)(STUDENT, TAUGHT)
    # 1/3 log 4/3 + 2/3 log 4, and log 2 whatever is taught.
    np.testing.assert_allclose(scored.distillation, [[1.0200902, 0.6931472]], rtol=1e-6)
    np.testing.assert_allclose(scored.nll, [[0.2876821, 0.6931472]], rtol=1e-6)
    # The student's probabilities less the teacher's; nothing reaches the teacher.
    expected = [[[0.4166667, -0.4166667], [0.3333333, -0.3333333]]]
    np.testing.assert_allclose(by_student, expected, rtol=1e-5)
    np.testing.assert_array_equal(by_taught, np.zeros((1, 2, 2)))


def test_a_temperature_flattens_both_distributions_by_hand():
    class Given:
        def logits(self, hidden):
            return hidden

    student, taught = jnp.log(jnp.array([[[9.0, 1.0]]])), jnp.log(jnp.array([[[1.0, 4.0]]]))

    def soft(student):
        heads, targets = (Given(), Given()), jnp.array([[0]])
        return distil_tokens(heads, student, targets, taught, chunk=0, temperature=2.0)

    # At T = 2, odds of 9:1 become 3:1, and 1:4 become 1:2. The cross-entropy of (3/4, 1/4) against
    # (1/3, 2/3) is 1/3 log 4/3 + 2/3 log 4 = 1.0200902, times T^2 = 4.
    found = soft(student)
    np.testing.assert_allclose(found.distillation, [[4 * 1.0200902]], rtol=1e-6)
    np.testing.assert_allclose(found.nll, [[np.log(10 / 9)]], rtol=1e-5)
    # Its gradient is T times the difference of the probabilities.
    gradient = jax.grad(lambda x: soft(x).distillation.sum())(student)
    np.testing.assert_allclose(gradient, [[[2 * 5 / 12, -2 * 5 / 12]]], rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1,), (2, 2, 1, 1, 2)])
def test_distillation_in_chunks_is_that_of_the_whole(sizes):
    hidden, targets = jnp.tile(HIDDEN, (2, 2, 1)), jnp.tile(TARGETS, (2, 2))
    wide = jax.random.normal(jax.random.key(3), (4, 12, 7))
    other = jax.random.normal(jax.random.key(4), (7, VOCAB))

    def objective(kernel, hidden, chunk):
        heads = Linear(kernel), Linear(other)
        scored = distil_tokens(heads, hidden, targets, wide, chunk=chunk)
        mixed = scored.nll + scored.distillation * jnp.arange(12.0)
        return mixed.sum(), (scored.nll, scored.distillation)

    step = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True), static_argnums=2)
    whole = step(KERNEL, hidden, 0)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])):
        found = step(KERNEL, hidden, 3)
    for one, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-4, atol=1e-5)


def test_only_a_chunk_of_the_teachers_logits_is_made_at_a_time():
    heads = Linear(KERNEL), Linear(KERNEL)
    distil_tokens(heads, HIDDEN, TARGETS, HIDDEN, chunk=2)
    assert set(heads[0].seen) == set(heads[1].seen) == {2}
