"""The exchange of rows in parts of unequal lengths, on four devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax.parallel import MeshConfig, exchange_rows, make_mesh

# Row i, column j: the number of rows that device i sends to device j.
SIZES = np.array([[1, 2, 0, 1], [0, 0, 4, 0], [0, 0, 0, 0], [2, 0, 1, 1]])
ROWS = 4


def exchanged(sizes, rows, length, weights):
    """Returns the received rows ``(4 T, M)`` of four devices, and the gradient ``(4 R, M)``.

    The loss is the sum of the received rows times ``weights (4 T, M)``.
    """
    mesh = make_mesh(MeshConfig(expert=4), jax.devices()[:4])
    parts = PartitionSpec("expert")
    table = jnp.asarray(sizes, jnp.int32)

    def local(rows):
        return exchange_rows(rows, table, length)

    def loss(rows):
        y = jax.shard_map(local, in_specs=parts, out_specs=parts, check_vma=False)(rows)
        return (y * weights).sum(), y

    with jax.set_mesh(mesh):
        rows = jax.device_put(rows, jax.sharding.NamedSharding(mesh, parts))
        (_, received), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(rows)
    return np.asarray(received), np.asarray(gradient)


def test_rows_come_in_the_order_of_their_senders():
    # Rows are numbered by device: device 0 has 0 to 3, device 1 has 10 to 13, and so on.
    rows = (10 * np.arange(4)[:, None] + np.arange(ROWS)).reshape(-1, 1).astype(np.float32)
    received, gradient = exchanged(SIZES, rows, 6, np.ones((24, 1), np.float32))
    # Device 0 gets row 0 of device 0 and the first two rows of device 3; device 1 gets rows 1 and
    # 2 of device 0; device 2 all rows of device 1 and then row 32; device 3 rows 3 and 33.
    assert received.reshape(4, 6).tolist() == [
        [0, 30, 31, 0, 0, 0],
        [1, 2, 0, 0, 0, 0],
        [10, 11, 12, 13, 32, 0],
        [3, 33, 0, 0, 0, 0],
    ]
    # Rows that are sent have gradient 1: all of device 0, 1 and 3, and none of device 2.
    assert gradient.reshape(4, ROWS).tolist() == [[1] * 4, [1] * 4, [0] * 4, [1] * 4]


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_travels_back_to_the_sender(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(ROWS - 1, rng.dirichlet(np.ones(4)), size=4)
    rows = rng.normal(size=(4 * ROWS, 3)).astype(np.float32)
    weights = rng.normal(size=(4 * 16, 3)).astype(np.float32)

    gradient = exchanged(sizes, rows, 16, weights)[1].reshape(4, ROWS, 3)
    expected = np.zeros_like(gradient)
    by_device = weights.reshape(4, 16, 3)
    for sender in range(4):
        for receiver in range(4):
            number = sizes[sender, receiver]
            sent = sizes[sender, :receiver].sum() + np.arange(number)
            placed = sizes[:sender, receiver].sum() + np.arange(number)
            expected[sender, sent] = by_device[receiver, placed]
    np.testing.assert_array_equal(gradient, expected)
