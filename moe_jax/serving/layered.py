"""The step of an engine whose experts are not all on the device.

The step is traced once as a whole and cut at its experts. Between two segments the host reads which
experts the tokens have chosen, takes them from a cache, and starts one small program for each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Int

from moe_jax.grouped import Blocks, with_expert
from moe_jax.models import Decoder
from moe_jax.models.stack import StackCache
from moe_jax.offload import ExpertCache, Predictor, Store, weights_of
from moe_jax.serving.program import Samples, StepInputs, StepShape, step
from moe_jax.serving.segments import Segment, segments_of, without_notes
from moe_jax.serving.without_experts import EXPERTS, FORESEEN, ExpertWork


class Programs:
    """Compiled programs; functions with the same instructions share one."""

    def __init__(self) -> None:
        self._by_text: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._by_text)

    def compiled(
        self, run: Callable[..., Any], inputs: Sequence[Any], donated: Sequence[int] = ()
    ) -> Any:
        """Returns the program of a function.

        Args:
            run: The function.
            inputs: Shapes and types of its inputs.
            donated: Indices of the inputs whose memory the outputs may take.
        """
        lowered = jax.jit(run, donate_argnums=tuple(donated)).lower(*inputs)
        text = lowered.as_text()
        if text not in self._by_text:
            self._by_text[text] = lowered.compile()
        return self._by_text[text]


class LayeredStep:
    """The step of one shape, as segments with the experts between them.

    Attributes:
        out_info: Shapes and types of the outputs, as a compiled step has them.
        output_shardings: Shardings of the outputs, as a compiled step has them.
    """

    def __init__(
        self,
        model: Decoder,
        layers: StackCache,
        shape: StepShape,
        top: int,
        host: Host,
        also: Collection[str] = (),
    ):
        """Compiles all segments, and the programs of the experts between them.

        Args:
            model: Decoder without experts.
            layers: Pages of all layers.
            shape: Shapes of the step.
            top: Number of most likely tokens.
            host: The experts.
            also: Names of optional fields of the samples to return; see ``program.step``.
        """
        leaves, tree = jax.tree.flatten(model)

        def run(leaves: list[Array], layers: StackCache, inputs: StepInputs) -> Any:
            return step(jax.tree.unflatten(tree, leaves), layers, inputs, shape, top, also)

        arguments = leaves, layers, StepInputs.empty(shape)
        traced, self.out_info = jax.make_jaxpr(run, return_shape=True)(*arguments)
        (device,) = jax.tree.leaves(layers)[0].devices()
        self.output_shardings = jax.tree.map(lambda _: SingleDeviceSharding(device), self.out_info)
        whole = without_notes(traced.jaxpr, EXPERTS, FORESEEN)
        self._inputs, self._outputs = whole.invars, whole.outvars
        self._constants = dict(zip(whole.constvars, traced.consts, strict=True))
        self._tree = jax.tree.structure(self.out_info)
        pages = {*whole.invars[len(leaves) : len(leaves) + len(jax.tree.leaves(layers))]}
        self._segments: list[tuple[Segment, Any, Any]] = []
        for segment in segments_of(whole, EXPERTS):
            inputs = segment.jaxpr.invars
            donated = [index for index, each in enumerate(inputs) if each in pages]
            program = host.programs.compiled(_named(segment), _shapes(inputs), donated)
            apply = None if segment.mark is None else host.compiled(segment.mark)
            self._segments.append((segment, program, apply))

    def __call__(
        self, leaves: list[Array], layers: StackCache, inputs: StepInputs
    ) -> tuple[StackCache, Samples]:
        """Returns the pages with the tokens of a step, and the samples; see ``program.step``."""
        given = jax.tree.leaves((leaves, layers, jax.device_put(inputs)))
        values: dict[Any, Any] = self._constants | dict(zip(self._inputs, given, strict=True))
        for segment, program, apply in self._segments:
            found = program(*(values[each] for each in segment.jaxpr.invars))
            values |= zip(segment.jaxpr.outvars, found, strict=True)
            if segment.mark is not None and apply is not None:
                operands = [values[each] for each in segment.mark.invars]
                values[segment.mark.outvars[0]] = apply(*operands)
        ends = (x.val if isinstance(x, Literal) else values[x] for x in self._outputs)
        done: tuple[StackCache, Samples] = jax.tree.unflatten(self._tree, ends)
        return done


class Host:
    """Applies the experts of all layers, one after the other.

    Attributes:
        programs: All programs.
        cache: The experts on the device.
    """

    def __init__(self, store: Store, cache: ExpertCache, predictor: Predictor):
        """Holds the experts.

        Args:
            store: All experts.
            cache: The experts on the device.
            predictor: Foresees the experts of the next layer.
        """
        self.programs, self.cache = Programs(), cache
        self._store, self._predictor = store, predictor

    def compiled(self, mark: JaxprEqn) -> Callable[..., Array]:
        """Returns the function from the operands of a mark to the outputs of its experts."""
        work: ExpertWork = mark.params["work"]
        tokens, token, weight, _, _, found, *_ = _shapes(mark.invars)
        own = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
            dict(self._store.read((work.layer, 0))),
        )
        row = jax.ShapeDtypeStruct((), np.int32)

        def expert(own: Mapping[str, Array], found: Array, rows: Any, edge: Any) -> Array:
            tokens, token, weight = rows
            held, blocks = weights_of(own, found.dtype), Blocks(tokens, token, weight, work.sizes)
            return with_expert(work.config, held, blocks, found, edge, work.gate_on)

        inputs = own, found, (tokens, token, weight), (row, row)
        program = self.programs.compiled(expert, inputs, donated=(1,))
        return lambda *operands: self._apply(program, work.layer, *operands)

    def _apply(
        self,
        program: Callable[..., Array],
        layer: int,
        tokens: Array,
        token: Array,
        weight: Array,
        place: Array,
        sizes: Array,
        found: Array,
        *foreseen: Array,
    ) -> Array:
        """Returns the outputs of all rows, and starts to load the experts of the next layer."""
        counts = np.asarray(sizes)
        ends = np.cumsum(counts, dtype=np.int32)
        for expert, own in self.cache.take(layer, np.flatnonzero(counts).tolist()):
            edge = np.int32(ends[expert] - counts[expert]), ends[expert]
            found = program(dict(own), found, (tokens, token, weight), edge)
        self._foresee(layer, np.searchsorted(ends, np.asarray(place), side="right"), foreseen)
        return found

    def _foresee(
        self, layer: int, experts: Int[np.ndarray, "T K"], foreseen: Sequence[Array]
    ) -> None:
        """Starts to load experts of the next layer; expert ``E`` stands for no choice."""
        experts = np.where(experts < self._store.experts[layer], experts, -1)
        routed = (experts >= 0).any(1)
        scores = np.asarray(foreseen[0])[routed] if foreseen else None
        wanted = self._predictor.next(layer, experts[routed], scores)
        if layer + 1 < len(self._store.experts):
            self.cache.prefetch(layer + 1, wanted)


def _named(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose name no program depends on."""

    def segment(*values: Any) -> Any:
        return run(*values)

    return segment


def _shapes(atoms: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    avals = [atom.aval for atom in atoms]
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in avals]
