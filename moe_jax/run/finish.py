"""Finishes a run: final validation, baselines, tokens of each expert, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from absl import logging

from moe_jax import data, files, processes
from moe_jax.counting import Cost
from moe_jax.errors import line_of
from moe_jax.run import workdir
from moe_jax.run.alarms import open_watch
from moe_jax.run.loop import Diverged
from moe_jax.run.session import Session
from moe_jax.run.validation_routing import ValidationRouting, against_truth, expert_tokens
from moe_jax.training.average import with_average
from moe_jax.training.metrics import METRICS, REPORT, MetricsWriter, eval_record, read_metrics
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
        session: Session of the run.
        state: State after the last step; validations may have ended the run early.
        cost: Parameters and FLOPs of the model.
        folder: Workdir of the run.
        seconds: Seconds that the run took in this process.
        lost_lines: Description of the lines that the log has lost, or "".

    Returns:
        The summary to print; "" in every process but the first.
    """
    experiment = session.experiment
    steps, state = int(state.step), with_average(state)
    with jax.set_mesh(session.mesh):
        record = session.evaluate(state)
        routing = ValidationRouting(session, state)
        table, truth = expert_tokens(routing), against_truth(routing)
    skipped = int(state.skipped)
    if not processes.is_first():
        return ""
    # Spans, masked tokens and answers are not comparable with baselines that read whole documents.
    partial = experiment.data.sentinels or experiment.data.marks_answers
    baselines = {} if partial else data.baselines(experiment.data)
    writers = experiment.training.writers
    with MetricsWriter(folder, resume_step=steps, writers=writers) as writer:
        seen = open_watch(experiment, folder, steps).see(eval_record(steps, record))
        writer.write(seen.line)
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
        **({"ended_early": True} if steps < experiment.training.steps else {}),
        **({"lost_lines": lost_lines} if lost_lines else {}),
    }
    files.write_json(folder / workdir.RESULT, result)
    (folder / workdir.DIVERGED).unlink(missing_ok=True)
    _write_report(folder)
    return "\n".join([*seen.new, _in_lines(result, baselines, folder)])


def has_result(folder: Path) -> bool:
    """Returns whether a run is finished, and writes a missing or truncated report again.

    A kill after ``result.json`` is written leaves a run without a report. If ``result.json`` or
    ``expert_tokens.json`` is corrupt, the run counts as unfinished, and the caller repeats the
    evaluation from the last checkpoint.
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
        _mend(folder)
    return True


def _mend(folder: Path) -> None:
    """Warns about an incomplete log, and writes a missing or truncated report again."""
    fault = _fault_of_log(folder)
    if fault:
        logging.warning("%s is %s: the results stand without it", folder / METRICS, fault)
    if not _is_whole(folder / REPORT):
        logging.warning("%s is missing or cut: written again", _write_report(folder))


def _write_report(folder: Path) -> Path:
    # Figures take a sixth of the time in which a command starts, and most commands draw none.
    from moe_jax.analysis.report import write_report

    return write_report(folder)


def _fault_of_log(folder: Path) -> str:
    """Returns the fault of a finished run's log, or ""; a complete log ends with an evaluation."""
    if not (folder / METRICS).exists():
        return "missing"
    try:
        records = read_metrics(folder)
    except ValueError as error:
        return f"damaged ({line_of(error)})"
    return "" if records and records[-1]["kind"] == "eval" else "cut"


def _fault(path: Path) -> str:
    """Returns the fault of a JSON file, or ""."""
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
    """Writes ``diverged.json``: last finite step, reason, seconds and devices.

    Args:
        folder: Workdir of the run.
        end: Exception that ended the run.
        seconds: Seconds that the run took in this process.
    """
    fields = {"step": end.step, "reason": str(end), "seconds": seconds, "device": _devices()}
    if processes.is_first():
        files.write_json(folder / workdir.DIVERGED, fields)


def _devices() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _in_lines(result: dict[str, Any], baselines: dict[str, float], folder: Path) -> str:
    bits, loss = result["bits_per_byte"], result["loss"]
    lines = [f"\nvalidation bits per byte: {bits:.3f}, loss per target: {loss:.3f} nats"]
    for name, part in result.get("parts", {}).items():
        lines.append(f"  {name:22s} {part['bits_per_byte']:.3f}, loss {part['loss']:.3f} nats")
    if "best_possible_loss" in result:
        lines.append(f"  best possible loss     {result['best_possible_loss']:.3f} nats")
    names = {"uniform": "uniform", "order2": "order-2 byte model", "zlib": "zlib -9, file by file"}
    for name, value in baselines.items():
        verdict = "beaten" if bits < value else "NOT beaten"
        lines.append(f"  {names[name]:22s} {value:.3f}  {verdict}")
    return "\n".join([*lines, f"report: {folder}/report.html"])
