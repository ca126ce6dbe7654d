"""Traces every row of the table with all annotations of transport and parallel checked.

The annotations are checked where functions are called, which includes tracing, so nothing is
compiled. The import hook works on modules that are not imported yet: ``test_shapes.py`` runs this
file in a process of its own, with four devices.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import typing

import jax
import jax.numpy as jnp
import jaxtyping
from flax import nnx
from jaxtyping import Array, Float

CHECKED = ("moe_jax.transport", "moe_jax.grouped", "moe_jax.parallel")

with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
    from moe_jax import transport
    from moe_jax.grouped import Choices, on_choices
    from moe_jax.parallel import MeshConfig, make_mesh

from moe_jax import routing  # noqa: E402

G, S, E, M, N = 4, 6, 8, 5, 7
NAMES = ("mixtral", "expert_choice", "soft_moe")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One linear map."""

    def before(self, linear, x):
        return linear(x, "kernel")

    def after(self, linear, pre, gate):
        return pre if gate is None else pre * gate


class Experts(nnx.Module):
    """One matrix per expert."""

    def __init__(self, outputs: int):
        self.kernel = nnx.Param(jnp.ones((E, M, outputs)), axes=("expert", None, None))

    def __call__(self, x: Float[Array, "E T M"]) -> Float[Array, "E T N"]:
        return jnp.einsum("etm,emn->etn", x, self.kernel[...].astype(x.dtype))

    def on_choices(
        self,
        tokens: Float[Array, "T M"],
        gate: Float[Array, "T K"],
        choices: Choices,
        gate_on: str = "out",
    ) -> Float[Array, "T N"]:
        parameters = {"kernel": self.kernel[...].astype(tokens.dtype)}
        return on_choices(Matrix(), parameters, tokens, gate, choices, gate_on)


def routed(name: str, logits: Float[Array, "G S E"]) -> routing.Plan:
    """Returns the plan of a preset in evaluation."""
    router = routing.preset(name)
    state = {key: jnp.zeros(shape) for key, shape in router.state_shapes(E).items()}
    logits = logits if router.planes == 1 else jnp.stack([logits] * router.planes, axis=-1)
    valid = jnp.ones((G, S), bool)
    return routing.route(router, logits, capacity=3, valid=valid, state=state)


def run(
    row: transport.Implementation, name: str, gate_on: str, experts: Experts, x: Array
) -> Array:
    """Returns a value that depends on all outputs of a layer."""
    plan = routed(name, jnp.ones((G, S, E)))
    return row.dispatch(experts, x, plan, gate_on=gate_on).astype(jnp.float32).sum()


def trace(row: transport.Implementation, name: str, dtype: str, gate_on: str) -> None:
    """Traces values and gradients of one row."""
    outputs = M if row.exchange == "ring" else N
    one = jax.grad(functools.partial(run, row, name, gate_on), argnums=(0, 1))
    jax.eval_shape(one, Experts(outputs), jnp.ones((G, S, M), dtype))


def executes(row: transport.Implementation, name: str, shards: int) -> bool:
    """Returns True if the row accepts the plans of a preset."""
    router = routing.preset(name)
    by_slot = row.transport == "einsum" or router.select.slot_table
    by_choice = row.transport != "ragged" or not (router.select.experts_choose or shards > 1)
    return by_slot and by_choice


def rejects_an_untrue_shape() -> bool:
    """Returns True if tokens without a group axis are rejected, as a self-test."""
    try:
        transport.Einsum().dispatch(jnp.ones((S, M)), routed("switch", jnp.ones((G, S, E))))
    except jaxtyping.TypeCheckError:
        return True
    return False


def evaluate_annotations() -> int:
    """Returns the number of functions and classes whose annotations are names that exist.

    Beartype accepts every value for an annotation that it cannot evaluate.
    """
    count = 0
    for module in [name for name in sys.modules if name.startswith(CHECKED)]:
        members = [each for each in vars(sys.modules[module]).values() if callable(each)]
        local = [each for each in members if getattr(each, "__module__", "") == module]
        methods = [each for part in local for each in getattr(part, "__dict__", {}).values()]
        for each in (*local, *filter(inspect.isfunction, methods)):
            typing.get_type_hints(each)
            count += 1
    return count


def main() -> None:
    """Raises ``jaxtyping.TypeCheckError`` if an annotation is untrue."""
    meshes = make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(expert=2))
    traced = 0
    for mesh, shards in zip(meshes, (1, 2), strict=True):
        for row in transport.TABLE:
            for name in NAMES:
                if executes(row, name, shards):
                    gate_on, dtype = ("in", "float32") if name == "mixtral" else ("out", "bfloat16")
                    with jax.set_mesh(mesh):
                        trace(row, name, dtype, gate_on)
                    traced += 1
    assert rejects_an_untrue_shape(), "the hook checks nothing"
    count = evaluate_annotations()
    assert count > 50, count
    print(f"{traced} cases and {count} functions and classes have true annotations")


if __name__ == "__main__":
    main()
