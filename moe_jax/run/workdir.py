"""Reads and writes the folder of a run, and checks that its configuration stays the same."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from moe_jax import files
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build, describe, flat
from moe_jax.errors import ConfigError
from moe_jax.run.changes import Change, Differences, check_changes
from moe_jax.training.step_folders import latest_step

CONFIG, RESULT, DIVERGED, EXPERT_TOKENS, CHECKPOINTS = (
    "config.json",
    "result.json",
    "diverged.json",
    "expert_tokens.json",
    "checkpoints",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
_SOURCES = "sources"
_CORPUS = "corpus"
_CHANGES = "changes"
_COMMAND = "command"
_TRAINED_WITH = ("versions", "git_commit")
# Versions of datasets whose runs did not record a hash of their text.
_CHANGED_DATASETS = {"python_library": "1.0.0"}
_LOCK = ".lock"
# Settings that may change within a run, because its numbers do not depend on them.
_FREE = (
    "mesh.",
    "training.log_every",
    "training.writers",
    "training.alarms",
    "training.eval_every",
    "training.checkpoint_every",
    "training.keep_",
)


@contextlib.contextmanager
def locked(workdir: Path, wait: bool = False) -> Iterator[None]:
    """Locks ``workdir`` against other training processes; the end of the process unlocks it.

    A file system without locks gets a warning and no lock.

    Args:
        workdir: Folder of the run, created if missing.
        wait: Whether to wait for a process that trains there, instead of raising.

    Raises:
        ConfigError: If another process trains there.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(
                f"another process is training in {workdir}: wait for it, or use another --workdir"
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): start only one run there", workdir, error)
        yield


def check_folder(workdir: Path) -> None:
    """Rejects a path that cannot be the folder of a run, without creating it.

    Raises:
        ConfigError: If the path, or a name in it, is a file instead of a folder or the reverse.
    """
    files.check_folder(workdir, "--workdir")
    for name in (CONFIG, RESULT, DIVERGED, EXPERT_TOKENS, _LOCK):
        if (workdir / name).is_dir():
            raise ConfigError(f"{workdir / name} is a folder, and a run writes a file there")
    if (workdir / CHECKPOINTS).exists() and not (workdir / CHECKPOINTS).is_dir():
        raise ConfigError(f"{workdir / CHECKPOINTS} is a file, and a run makes a folder there")


def claim(
    workdir: Path,
    experiment: Experiment,
    sources: Mapping[str, str] | None = None,
    *,
    change: bool = False,
    command: str = "",
) -> Change | None:
    """Makes ``workdir`` the folder of ``experiment``, or checks that it already is.

    A change of settings is added to the list ``changes`` of ``config.json``. A finished run whose
    settings change is unfinished afterwards.

    Args:
        workdir: Folder of the run.
        experiment: Configuration of the run.
        sources: Maps each setting that points to another run, such as ``training.teacher``, to a
            content hash of its weights. The run may move, but its weights must not change. Sources
            that the run does not read any more may be absent.
        change: True if the number of steps and the rates may differ from those of the run.
        command: Command that trains the run, for its report; "" if a program trains it.

    Returns:
        The change of settings, or ``None``.

    Raises:
        ConfigError: If the folder belongs to another configuration; the message lists the
            differences.
    """
    found, differences = check_owner(workdir, experiment, sources, change=change)
    path = workdir / CONFIG
    saved: dict[str, Any] = {}
    if path.exists():
        saved = _read(path)
    elif any((workdir / CHECKPOINTS).glob("[0-9]*")):
        logging.warning(
            "%s is missing: the run goes on with the settings of this command, which nothing "
            "compares with the settings of its checkpoints",
            path,
        )
    changed = Change(_done(workdir), differences) if differences else None
    changes = [*saved.get(_CHANGES, []), *([changed.record()] if changed else [])]
    kept = {_SOURCES: found, _CORPUS: saved.get(_CORPUS), _CHANGES: changes, _COMMAND: command}
    about: dict[str, Any] = dict(zip(_TRAINED_WITH, (_versions(), _git_commit()), strict=True))
    about |= {name: value for name, value in kept.items() if value}
    if not changed and (workdir / RESULT).exists():  # Nothing is trained any more.
        about |= {name: saved[name] for name in (*_TRAINED_WITH, _COMMAND) if name in saved}
    if changed:
        # Before the new settings: a kill in between leaves the old run, which is evaluated again.
        (workdir / RESULT).unlink(missing_ok=True)
    files.write_json(path, {"config": describe(experiment), **about})
    return changed


def check_owner(
    workdir: Path,
    experiment: Experiment,
    sources: Mapping[str, str] | None = None,
    *,
    change: bool | None = False,
) -> tuple[dict[str, str], Differences]:
    """Checks that a run may begin or resume in ``workdir``; see ``claim``.

    Args:
        workdir: Folder of the run.
        experiment: Configuration of the run.
        sources: See ``claim``.
        change: Whether the user asks for a change of settings; ``None`` if nobody can ask for one.

    Returns:
        The sources of the run, and the settings that change.

    Raises:
        ConfigError: If the folder belongs to another configuration; the message lists the
            differences.
    """
    path, found = workdir / CONFIG, dict(sources or {})
    if not path.exists():
        return found, {}
    saved = _read(path)
    known = saved.get(_SOURCES, {})
    found = known | found
    differences = _differences(
        _named_by_content(_with_defaults(saved["config"]), known),
        _named_by_content(describe(experiment), found),
    )
    steps, done = experiment.training.steps, _done(workdir)
    check_changes(workdir, differences, allowed=change, steps=steps, done=done)
    return found, differences


def _done(workdir: Path) -> int:
    """Returns the step of the newest checkpoint, or 0."""
    return latest_step(workdir / CHECKPOINTS) or 0


def claim_corpus(workdir: Path, corpus: Mapping[str, Any]) -> None:
    """Records the corpus of a run, or checks that the corpus is unchanged.

    Args:
        workdir: Claimed folder of the run.
        corpus: ``sha256`` of the text, and the numbers of documents.

    Raises:
        ConfigError: If the text has changed since the run began.
    """
    check_corpus(workdir, corpus)
    saved = _read(workdir / CONFIG)
    if saved.get(_CORPUS) is None:
        files.write_json(workdir / CONFIG, {**saved, _CORPUS: dict(corpus)})


def recorded_corpus(workdir: Path) -> Mapping[str, Any] | None:
    """Returns the record of the corpus of a run, or ``None`` if the run has none."""
    return _read(workdir / CONFIG).get(_CORPUS)


def record_corpus(workdir: Path, corpus: Mapping[str, Any]) -> None:
    """Records the corpus of a run that has none; see ``claim_corpus``."""
    files.write_json(workdir / CONFIG, {**_read(workdir / CONFIG), _CORPUS: dict(corpus)})


def check_corpus(workdir: Path, corpus: Mapping[str, Any]) -> None:
    """Checks that the corpus of a run is unchanged, without writing a file.

    Args:
        workdir: Folder of the run.
        corpus: ``sha256`` and numbers of documents, as in ``claim_corpus``.

    Raises:
        ConfigError: If the text has changed since the run began.
    """
    saved = _read(workdir / CONFIG)
    source = saved["config"]["data"]["source"]
    before = saved.get(_CORPUS)
    if before is None:
        old = _CHANGED_DATASETS.get(source)
        if old and (workdir / CHECKPOINTS).exists():
            raise ConfigError(
                f"{workdir} holds a run on version {old} of {source}, and its text has changed "
                "since: use another --workdir, or delete it"
            )
    elif before["sha256"] != corpus["sha256"]:
        raise ConfigError(
            f"the text of data.source={source!r} has changed since the run in {workdir} began "
            f"({_summary(before)} then, {_summary(corpus)} now): restore it, or use another "
            "--workdir"
        )


def _summary(corpus: Mapping[str, Any]) -> str:
    documents = corpus["training"] + corpus["validation"]
    return f"{documents:,} documents of SHA-256 {corpus['sha256'][:12]}"


def check_shared(workdir: Path) -> None:
    """Raises ``ConfigError`` if this process does not see the folder that the first one claimed."""
    if not (workdir / CONFIG).exists():
        raise ConfigError(
            f"this process does not see the {workdir} of the first process: put --workdir on a "
            "file system that all processes share"
        )


def load(workdir: Path) -> Experiment:
    """Returns the experiment of the run in ``workdir``.

    Raises:
        ConfigError: If the folder holds no run, or a configuration that cannot be read.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run ({CONFIG} is missing): train one there first")
    saved = _read(path)["config"]
    try:
        return build(Experiment, saved)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}): restore it from a backup, or delete it and train with "
            "the settings that the run had"
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder, and a run writes a file there") from error
    groups = saved if isinstance(saved, dict) else {}
    if not isinstance(groups.get("config"), dict) or not isinstance(groups.get(_SOURCES, {}), dict):
        raise ConfigError(f"{path} was not written by a run: use another folder")
    return saved


def _with_defaults(described: Any) -> Any:
    """Returns a saved configuration with the defaults of settings that are newer than the run."""
    try:
        return describe(build(Experiment, described))
    except ConfigError:
        return described


def _named_by_content(described: Any, sources: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings by dotted name, with content hashes in place of other runs' folders."""
    named = flat(described)
    return named | {name: f"weights {sources[name]}" for name in sources if named.get(name)}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Differences:
    missing = "unset"
    return {
        key: (before.get(key, missing), after.get(key, missing))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, missing) != after.get(key, missing) and not key.startswith(_FREE)
    }


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **versions}


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
