"""The end of a run: validation beside baselines, what the experts take, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from absl import logging

from moe_jax import data, files, processes
from moe_jax.analysis.report import REPORT, write_report
from moe_jax.counting import Cost
from moe_jax.errors import line_of
from moe_jax.run import workdir
from moe_jax.run.loop import Diverged
from moe_jax.run.session import Session
from moe_jax.run.validation_routing import ValidationRouting, against_truth, expert_tokens
from moe_jax.training.metrics import METRICS, MetricsWriter, eval_record, read_metrics
from moe_jax.training.state import TrainState


def finish(
    session: Session,
    state: TrainState,
    cost: Cost,
    folder: Path,
    *,
    seconds: float,
    lost_lines: str = "",
) -> str:
    """Evaluates, and writes ``result.json``, ``expert_tokens.json`` and ``report.html``.

    Args:
        session: the run.
        state: after the last step.
        cost: of the model.
        folder: the workdir.
        seconds: how long the run took in this process.
        lost_lines: says which lines of the log are missing, or "".

    Returns:
        What was found, in lines; none in other processes than the first.
    """
    experiment = session.experiment
    steps = experiment.training.steps
    with jax.set_mesh(session.mesh):
        record = session.evaluate(state)
        routing = ValidationRouting(session, state)
        table, truth = expert_tokens(routing), against_truth(routing)
    skipped = int(state.skipped)
    if not processes.is_first():
        return ""
    # What is cut out of a text cannot be compared with models of whole texts.
    baselines = {} if experiment.data.spans else data.baselines(experiment.data)
    with MetricsWriter(folder, resume_step=steps) as writer:
        writer.write(eval_record(steps, record))
    files.write_json(folder / workdir.EXPERT_TOKENS, table)
    result = {
        **record,
        **truth,
        "baselines": baselines,
        "total_parameters": cost.total,
        "active_parameters": cost.active,
        "flops_per_token": cost.flops_per_token,
        "steps": steps,
        "tokens": steps * experiment.tokens_per_step,
        "skipped_updates": skipped,
        "seconds": seconds,
        "device": _devices(),
        "mesh": dict(session.mesh.shape),
        **({"lost_lines": lost_lines} if lost_lines else {}),
    }
    files.write_json(folder / workdir.RESULT, result)
    (folder / workdir.DIVERGED).unlink(missing_ok=True)
    write_report(folder)
    return _in_lines(result, baselines, folder)


def has_result(folder: Path) -> bool:
    """Returns whether a run is finished; its report is written anew where it is missing or cut.

    A kill between ``result.json`` and the report leaves the one without the other. Where the result
    or ``expert_tokens.json`` is damaged, the evaluation is repeated from the last checkpoint.
    """
    if not (folder / workdir.RESULT).exists():
        return False
    for name in (workdir.RESULT, workdir.EXPERT_TOKENS):
        fault = _fault(folder / name)
        if fault:
            if processes.is_first():
                logging.warning("%s is %s: the run is evaluated again", folder / name, fault)
            return False
    if processes.is_first():
        _look_after(folder)
    return True


def _look_after(folder: Path) -> None:
    """Names a log that is not whole, and writes a report anew that is missing or cut."""
    fault = _fault_of_log(folder)
    if fault:
        logging.warning("%s is %s: the results stand without it", folder / METRICS, fault)
    if not _is_whole(folder / REPORT):
        logging.warning("%s is missing or cut: written again", write_report(folder))


def _fault_of_log(folder: Path) -> str:
    """Returns what is wrong with the log of a finished run, or ""; the evaluation ends it."""
    if not (folder / METRICS).exists():
        return "missing"
    try:
        records = read_metrics(folder)
    except ValueError as error:
        return f"damaged ({line_of(error)})"
    return "" if records and records[-1]["kind"] == "eval" else "cut"


def _fault(path: Path) -> str:
    """Returns what is wrong with a file of JSON, or ""."""
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return "missing"
    except ValueError as error:
        return f"damaged ({error})"
    return ""


def _is_whole(report: Path) -> bool:
    return report.exists() and report.read_bytes().rstrip().endswith(b"</html>")


def note_divergence(folder: Path, end: Diverged, *, seconds: float) -> None:
    """Writes ``diverged.json``: the last good step, why there is no later one, seconds and devices.

    Args:
        folder: the workdir.
        end: what ended the run.
        seconds: how long the run took in this process.
    """
    found = {"step": end.step, "reason": str(end), "seconds": seconds, "device": _devices()}
    if processes.is_first():
        files.write_json(folder / workdir.DIVERGED, found)


def _devices() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _in_lines(result: dict[str, Any], baselines: dict[str, float], folder: Path) -> str:
    bits, loss = result["bits_per_byte"], result["loss"]
    lines = [f"\nvalidation bits per byte: {bits:.3f}, loss per target: {loss:.3f} nats"]
    if "best_possible_loss" in result:
        lines.append(f"  best possible loss     {result['best_possible_loss']:.3f} nats")
    names = {"uniform": "uniform", "order2": "order-2 byte model", "zlib": "zlib -9, file by file"}
    for name, value in baselines.items():
        verdict = "beaten" if bits < value else "NOT beaten"
        lines.append(f"  {names[name]:22s} {value:.3f}  {verdict}")
    return "\n".join([*lines, f"report: {folder}/report.html"])
