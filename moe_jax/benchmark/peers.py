"""Candidates of other libraries, which are skipped with a reason where they cannot run."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax.benchmark.candidate import Call, Candidate, CannotRun
from moe_jax.benchmark.given import Problem
from moe_jax.benchmark.oracle import Values

# Values of the attribute ``_experts_implementation`` of a config of ``transformers``.
IMPLEMENTATIONS = ("eager", "grouped_mm")
COMPILED = "grouped_mm_compiled"


def candidates() -> list[Candidate]:
    """Returns layers of ``transformers``, products of ``torch`` by hand, and Liger's experts."""
    blocks = [
        Candidate(f"transformers/{name}", part, functools.partial(_open_transformers, part, name))
        for part in ("experts", "layer")
        for name in (*IMPLEMENTATIONS, COMPILED)
    ]
    return [
        *blocks,
        Candidate("torch/grouped_mm", "experts", _open_torch),
        Candidate("liger", "experts", _open_liger),
    ]


def imported(name: str) -> Any:
    """Returns a module.

    Raises:
        CannotRun: If the module is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotRun(f"{name.partition('.')[0]} is not installed") from error


def device_of(torch: Any) -> str:
    """Returns the device of PyTorch that is of the same kind as JAX's first device.

    Raises:
        CannotRun: If there is none.
    """
    platform = jax.default_backend()
    if platform == "cpu":
        return "cpu"
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise CannotRun(f"torch has no device of the kind {platform}")


def _open_transformers(part: str, name: str, problem: Problem, backward: bool) -> Call:
    torch, models = imported("torch"), imported("transformers.models.mixtral.modeling_mixtral")
    shape, device = problem.shape, device_of(torch)
    if not shape.gated:
        raise CannotRun("the experts of Mixtral are gated")
    config = importlib.import_module("transformers").MixtralConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
        hidden_act=shape.activation,
    )
    config._experts_implementation = "grouped_mm" if name == COMPILED else name
    block = models.MixtralSparseMoeBlock(config)
    place = functools.partial(_placed, torch, device, problem.dtype)
    gate_up, down = _transposed(problem)
    for parameter, value in (
        (block.experts.gate_up_proj, gate_up),
        (block.experts.down_proj, down),
        (block.gate.weight, problem.router.T),
    ):
        parameter.data = place(value)
    index = torch.from_numpy(problem.choices.astype(np.int64)).to(device)
    gates = place(problem.gates)

    def forward(x: Any) -> Any:
        return block(x[None])[0] if part == "layer" else block.experts(x, index, gates)

    weights = (block.experts.gate_up_proj, block.experts.down_proj)
    weights += (block.gate.weight,) if part == "layer" else ()
    run = torch.compile(forward) if name == COMPILED else forward
    return _call(torch, run, weights, place(problem.x), place(problem.dy), backward)


def _open_torch(problem: Problem, backward: bool) -> Call:
    """Opens experts by ``torch.nn.functional.grouped_mm``, as torchtitan computes them."""
    torch = imported("torch")
    device, k = device_of(torch), problem.shape.k
    if not problem.shape.gated or problem.shape.activation != "silu":
        raise CannotRun("the experts by hand have SwiGLU")
    functional = torch.nn.functional
    if not hasattr(functional, "grouped_mm"):
        raise CannotRun("this torch has no grouped_mm")
    place = functools.partial(_placed, torch, device, problem.dtype)
    gate_up, down = (place(value).requires_grad_() for value in _transposed(problem))
    expert = torch.from_numpy(problem.choices.reshape(-1)).to(device)
    gates = place(problem.gates).reshape(-1, 1)

    def forward(x: Any) -> Any:
        order = torch.argsort(expert, stable=True)
        loads = torch.bincount(expert, minlength=problem.shape.experts)
        ends = loads.cumsum(0).to(torch.int32)
        rows = x[order // k]
        gate, up = functional.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, dim=-1)
        hidden = functional.silu(gate) * up
        out = functional.grouped_mm(hidden, down.mT, offs=ends) * gates[order]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=device)
        return out[back].reshape(-1, k, x.shape[-1]).sum(1)

    return _call(torch, forward, (gate_up, down), place(problem.x), place(problem.dy), backward)


def _open_liger(problem: Problem, backward: bool) -> Call:
    torch, liger = imported("torch"), imported("liger_kernel.ops.fused_moe")
    device = device_of(torch)
    if device != "cuda" or not problem.shape.gated or problem.shape.activation != "silu":
        raise CannotRun("liger needs CUDA and SwiGLU")
    place = functools.partial(_placed, torch, device, problem.dtype)
    weights = tuple(place(value).requires_grad_() for value in _transposed(problem))
    index = torch.from_numpy(problem.choices).to(device)
    gates, fused = place(problem.gates), liger.LigerFusedMoEFunction

    def forward(x: Any) -> Any:
        return fused.apply(x, *weights, index, gates)

    return _call(torch, forward, weights, place(problem.x), place(problem.dy), backward)


def _transposed(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``gate_up (E, 2 F, M)`` and ``down (E, M, F)``."""
    given = problem.matrices
    gate_up = np.concatenate([given["gate"], given["up"]], axis=2).swapaxes(1, 2)
    return gate_up, given["down"].swapaxes(1, 2)


def _placed(torch: Any, device: str, dtype: str, value: np.ndarray) -> Any:
    array = np.array(value, order="C")  # a copy that PyTorch may write to
    return torch.from_numpy(array).to(device=device, dtype=getattr(torch, dtype))


def _call(
    torch: Any,
    forward: Callable[[Any], Any],
    weights: tuple[Any, ...],
    x: Any,
    dy: Any,
    backward: bool,
) -> Call:
    def once() -> Any:
        if not backward:
            with torch.no_grad():
                return (forward(x),)
        tokens = x.detach().requires_grad_()
        y = forward(tokens)
        return (y.detach(), *torch.autograd.grad(y, (tokens, *weights), dy))

    def run() -> Any:
        found = once()
        if x.is_cuda:
            torch.cuda.synchronize()
        return found

    return Call(run, _values, _memory(torch, run) if x.is_cuda else None)


def _memory(torch: Any, run: Callable[[], Any]) -> int:
    """Returns the peak bytes of a run above the bytes before it and of its results."""
    results = run()
    kept = sum(result.numel() * result.element_size() for result in results)
    del results
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return max(int(torch.cuda.max_memory_allocated() - before - kept), 0)


def _values(result: tuple[Any, ...]) -> Values:
    arrays = [value.float().cpu().numpy() for value in result]
    if len(arrays) == 1:
        return {"y": arrays[0]}
    y, x, gate_up, down, *routers = arrays
    gate, up = np.split(gate_up.swapaxes(1, 2), 2, axis=2)
    router = {"router": routers[0].T} if routers else {}
    return {"y": y, "x": x, "gate": gate, "up": up, "down": down.swapaxes(1, 2), **router}
