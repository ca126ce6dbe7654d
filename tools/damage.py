"""Damages one file of a run or of its data at a time, and records the outcome of the next command.

``python tools/damage.py --seed 0 --cases 40`` trains a tiny run to its end, and a second run up to
a crash between two checkpoints. In the folder of each run and in the prepared corpus, the tool cuts
in half, deletes or garbles one file of every kind. It then repeats the training command or, for a
checkpoint of the finished run, evaluates the run. Two outcomes are correct:

* The command ends with the result of the undamaged run, to the last bit. Warnings name each repair,
  each skipped checkpoint and each lost line of the log.
* The command ends with one ``error:`` line and no traceback. The tool then restores the file, and
  the next result must equal the result of the undamaged run: the error destroyed nothing else.

Each case adds a line to ``tools/damage.tsv``: run, file, damage, command and outcome. A case with a
line is skipped. The tool fails on any other outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import runpy
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "tools" / "damage.tsv"
STEPS, CRASH, SAVED = 8, 7, 6
_SETTINGS = {
    "training.steps": STEPS,
    "training.eval_every": 4,
    "training.checkpoint_every": 2,
    "data.source": "python_library/tiny",
}
_CLOCK = ("seconds", "lost_lines", "tokens_per_second")
_NUMBERS = re.compile(r"(?<=tfevents\.).*|\b[0-9a-f]{32}\b|\d+")
# Level and time of a log line.
_PREFIX = re.compile(r"[IWE]\d{4} \S+ +\d+ \w+\.py:\d+\] ")


def prepare(top: Path) -> None:
    """Imports the modules of the commands; prepares a corpus, a finished run and a crashed run."""
    programs = tempfile.gettempdir() + "/damage_cache"
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": programs}
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    from tests.xla import QUICK

    os.environ["XLA_FLAGS"] = " ".join(QUICK)
    from moe_jax.data.prepared import prepare as prepare_dataset
    from moe_jax.run import finish, restored  # noqa: F401
    from moe_jax.training import metrics  # noqa: F401
    from tests.data.corpora import tiny_builder, write_library
    from tests.system.forks import forked

    write_library(top / "library")
    # The libraries of the corpus start threads, which later forks would not inherit.
    forked(lambda: prepare_dataset(tiny_builder(top / "library", top / "data")))
    for name in ("finished", "half"):
        code, _, err = command(top, "train", top / name, crash=name == "half")
        assert code == (1 if name == "half" else 0), err


def command(top: Path, name: str, folder: Path, crash: bool = False) -> tuple[int, str, str]:
    """Runs a command in a fork and returns exit code, stdout and stderr."""
    from moe_jax.training.metrics import MetricsWriter
    from tests.system.forks import before, forked

    def wait_for_checkpoint() -> None:
        while not (folder / "checkpoints" / str(SAVED)).exists():
            time.sleep(0.01)
        os._exit(1)

    def act() -> None:
        if crash:
            late = lambda _, record: record["step"] == CRASH  # noqa: E731
            before(MetricsWriter, "write", wait_for_checkpoint, lambda: None, late)
        settings = {**_SETTINGS, "data.data_dir": top / "data"}
        overrides = [f"--config.{key}={value}" for key, value in settings.items()]
        config = ["--config=tests/system/tiny.py", *overrides] if name == "train" else []
        sys.argv = [name, *config, f"--workdir={folder}"]
        runpy.run_module(f"moe_jax.{name}", run_name="__main__", alter_sys=True)

    return forked(act)


def cases(top: Path, seed: int) -> list[tuple[str, Path, str, str]]:
    """Returns run, file, damage and command for one file of each kind, in random order."""
    kinds: dict[tuple[str, str], list[Path]] = {}
    for run in ("half", "finished", "data"):
        for path in sorted(file for file in (top / run).rglob("*") if file.is_file()):
            kinds.setdefault((run, kind(path.relative_to(top))), []).append(path)
    chosen = [
        (run, paths[-1], damage, "evaluate" if _evaluated(run, paths[-1]) else "train")
        for (run, _), paths in kinds.items()  # The last file belongs to the newest checkpoint.
        for damage in ("cut", "deleted", "garbled")
    ]
    return random.Random(seed).sample(chosen, len(chosen))


def _evaluated(run: str, path: Path) -> bool:
    return run == "finished" and "checkpoints" in path.parts


def kind(path: Path) -> str:
    """Returns a path without hashes, numbers and the name of the machine."""
    return _NUMBERS.sub("N", str(path))


def harm(path: Path, damage: str, seed: int) -> None:
    """Cuts a file in half, deletes it or changes bytes in it."""
    content = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        draw = random.Random(f"{seed} {path.name}")
        for offset in draw.choices(range(len(content) or 1), k=16):
            content[offset : offset + 1] = bytes([draw.randrange(256)])
        path.write_bytes(content)


def outcome(top: Path, case: tuple[str, Path, str, str], expected: str, seed: int) -> str:
    """Returns the outcome of a command after damage; ``FAULT`` marks an incorrect outcome."""
    run, path, damage, name = case
    folder = shutil.copytree(top / ("half" if run == "data" else run), top / "case")
    victim = path if run == "data" else folder / path.relative_to(top / run)
    content = victim.read_bytes()
    harm(victim, damage, seed)
    try:
        code, out, err = command(top, name, folder)
        said = " ".join(_PREFIX.sub("", err).split()).replace(str(top), "")
        if code == 0:
            same = result(folder, name, out) == expected
            older = name == "evaluate" and "skipped checkpoint" in err and f'"step": {SAVED}' in out
            if not same and not older:
                return f"FAULT: another result, {said}"
            if name == "train" and lost(folder) and "metrics.jsonl" not in err:
                return f"FAULT: lost {lost(folder)}, {said}"
            return f"{'same' if same else 'older'}{f', said: {said}' if said else ''}"
        if code != 2 or len(err.splitlines()) != 1 or not err.startswith("error: "):
            return f"FAULT: code {code}, {said[-300:]}"
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.write_bytes(content)
        code, out, err = command(top, name, folder)
        return said if code == 0 and result(folder, name, out) == expected else f"FAULT: {err}"
    finally:
        shutil.rmtree(folder)
        if run == "data":
            victim.write_bytes(content)


def result(folder: Path, name: str, out: str) -> str:
    """Returns all bits of the last evaluation of a run, without times."""
    if name == "evaluate":
        return out
    values = json.loads((folder / "result.json").read_text())
    timeless = {key: value for key, value in values.items() if key not in _CLOCK}
    return json.dumps([timeless, json.loads((folder / "expert_tokens.json").read_text())])


def lost(folder: Path) -> list[int]:
    """Returns the training steps that the log lacks; all steps if the log cannot be read."""
    try:
        text = (folder / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
    except (FileNotFoundError, ValueError):
        return list(range(1, STEPS + 1))
    logged = [line["step"] for line in lines if line["kind"] == "train"]
    return [step for step in range(1, STEPS + 1) if logged.count(step) != 1]


def main() -> None:
    """Runs the cases that have no line yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of files, bytes and order")
    parser.add_argument("--cases", type=int, default=1000, help="maximum number of cases")
    parser.add_argument("--only", default="", help="run only cases whose line contains this text")
    options = parser.parse_args()
    known = RESULT.read_text().splitlines() if RESULT.exists() else []
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        prepare(top)
        code, out, _ = command(top, "evaluate", top / "finished")
        expected = {n: result(top / "finished", n, out) for n in ("train", "evaluate")}
        for case in cases(top, options.seed)[: options.cases]:
            run, path, damage, to = case
            title = f"{run}\t{kind(path.relative_to(top / run))}\t{damage}\t{to}"
            if options.only in title and not any(line.startswith(title) for line in known):
                line = f"{title}\t{outcome(top, case, expected[to], options.seed)}"
                known.append(line)
                RESULT.write_text("\n".join(sorted(known)) + "\n")
                print(line, flush=True)
    sys.exit(any("\tFAULT" in line for line in known))


if __name__ == "__main__":
    main()
