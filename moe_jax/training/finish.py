"""The end of a run: validation beside baselines, what the experts take, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from moe_jax import data, workdir
from moe_jax.analysis.report import write_report
from moe_jax.analysis.tokens import TokenExpertTable
from moe_jax.nn.mode import Mode
from moe_jax.parallel import multihost
from moe_jax.planning import Cost
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.session import Session
from moe_jax.training.state import TrainState

_TABLE_BATCHES = 8
_TABLE_TOKENS = 12


def finish(
    session: Session, state: TrainState, cost: Cost, folder: Path, *, seconds: float
) -> None:
    """Evaluates, writes ``result.json``, ``expert_tokens.json`` and ``report.html``, and prints.

    Args:
        session: the run.
        state: after the last step.
        cost: of the model.
        folder: the workdir.
        seconds: how long the run took in this process.
    """
    experiment = session.experiment
    steps = experiment.training.steps
    with jax.set_mesh(session.mesh):
        record = session.evaluate(state)
        table = expert_tokens(session, state)
    skipped = int(state.skipped)
    if not multihost.is_first():
        return
    # What is cut out of a text cannot be compared with models of whole texts.
    baselines = {} if experiment.data.spans else data.baselines(experiment.data)
    with MetricsWriter(folder, resume_step=steps) as writer:
        writer.write({"kind": "eval", "step": steps, **record})
    workdir.write_json(folder / workdir.EXPERT_TOKENS, table)
    device = jax.devices()[0]
    result = {
        **record,
        "baselines": baselines,
        "total_parameters": cost.total,
        "active_parameters": cost.active,
        "flops_per_token": cost.flops_per_token,
        "steps": steps,
        "tokens": steps * experiment.tokens_per_step,
        "skipped_updates": skipped,
        "seconds": seconds,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "mesh": dict(session.mesh.shape),
    }
    workdir.write_json(folder / workdir.RESULT, result)
    write_report(folder)
    _announce(record, baselines, folder)


def expert_tokens(session: Session, state: TrainState) -> dict[str, Any]:
    """Returns which tokens each expert of each MoE layer takes most, on validation batches."""
    layers = session.experiment.model.sparse_layers()
    if not layers:
        return {"layers": []}

    def routed(params: nnx.State, router_state: nnx.State, batch: dict[str, jax.Array]):
        model = nnx.merge(session.graph, params, router_state)
        reading = model.read(batch, mode=Mode("eval", record=True))
        return model.routed(batch), [report.experts for report in reading.reports]

    step = jax.jit(routed, out_shardings=session.everywhere)
    tokenizer = session.tokenizer
    num_experts = max(layer.moe.num_experts for layer in layers)
    table = TokenExpertTable(len(layers), num_experts, tokenizer.vocab_size)
    for _, batch in zip(range(_TABLE_BATCHES), session.eval_batches(), strict=False):
        found = multihost.fetch(step(state.params, state.router_state, session.place(batch)))
        for index, ((tokens, real), experts) in enumerate(zip(*found, strict=True)):
            table.add(index, tokens[real], experts[real])
    return {
        "layers": [
            {
                "layer": layer.name,
                "experts": [
                    [
                        {"piece": tokenizer.piece(t.token), "count": t.count, "share": t.share}
                        for t in expert
                    ]
                    for expert in top[: layer.moe.num_experts]
                ],
            }
            for layer, top in zip(layers, table.top_tokens(_TABLE_TOKENS), strict=True)
        ]
    }


def _announce(record: dict[str, Any], baselines: dict[str, float], folder: Path) -> None:
    bits = record["bits_per_byte"]
    print(f"\nvalidation bits per byte: {bits:.3f}, loss per target: {record['loss']:.3f} nats")
    names = {"uniform": "uniform", "order2": "order-2 byte model", "zlib": "zlib -9, file by file"}
    for name, value in baselines.items():
        verdict = "beaten" if bits < value else "NOT beaten"
        print(f"  {names[name]:22s} {value:.3f}  {verdict}")
    print(f"report: {folder}/report.html", flush=True)
