"""Mutates the code, one expression at a time, and records the mutations that no test detects.

``python tools/mutate.py --sample 120 --seed 0`` draws mutations of routing, transport, grouped
products, the MoE layer, the step, the loss and the exchange, evenly over their files. A trial
applies a mutation to a copy of the package: the tests that mirror the changed file run first, wider
tests run only if these pass, and the first test that fails ends the trial. Each trial adds a line
to ``tools/mutations.tsv``: file, line and column, the mutation, ``killed`` or ``survived``, and the
test that failed. A mutation with a line is skipped, so a stopped run continues, and another seed
extends the sample. For a survivor that does not change the behaviour, a person writes
``equivalent`` and the reason into the line.

``--given tools/holes.tsv`` tries the mutations of a file instead (file, old text, new text).

Each trial is a fork of a process that has imported JAX but no part of the package. Trials share a
cache of compiled programs, so a trial compiles only programs that its mutation changes.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tools.mutations import ROOT, Mutation, drawn, given

RESULT = ROOT / "tools" / "mutations.tsv"
COPIED = ("moe_jax", "tests")
LINKED = ("configs", "experiments", "docs", "examples", "colab", "tools", "pyproject.toml")
IMPORTED = ("jax", "jax.numpy", "flax.nnx", "optax", "numpy", "pytest", "hypothesis.strategies")
_SPREAD = ("tests/routing/test_balance_spread.py", "tests/routing/test_balance_load.py")
_SELECT = tuple(
    f"tests/routing/test_{name}.py" for name in ("table", "select_tokens_choose", "select_assigned")
)
_ROUTE = ("tests/routing/test_router.py", "tests/transport/test_transports.py")
_ROUTER = ("tests/routing", "tests/transport", "tests/nn/test_moe.py")
_LAYER = ("tests/nn/test_moe.py", "tests/nn/test_features.py", "tests/training/test_step.py")
_EXCHANGE = ("tests/parallel/test_exchange.py", "tests/parallel/test_parity.py")
_STEP = tuple(f"tests/training/test_{name}.py" for name in ("step", "router_state", "distillation"))
# The first pattern that matches a file selects its tests: stages of test files, run in order.
TESTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "moe_jax/routing/balance/load.py": (("tests/routing/test_balance_load.py",), _ROUTER),
    "moe_jax/routing/balance/base.py": (_SPREAD, _ROUTER),
    "moe_jax/routing/balance/*": (_SPREAD[:1], _ROUTER),
    "moe_jax/routing/presets/*": (("tests/routing/test_presets.py",), _ROUTER),
    "moe_jax/routing/select/base.py": (_SELECT, _ROUTER),
    "moe_jax/routing/select/*": (("tests/routing/test_select_{stem}.py",), _ROUTER),
    "moe_jax/routing/plan.py": (("tests/routing/test_plan.py", *_ROUTE), _ROUTER),
    "moe_jax/routing/*": (("tests/routing/test_{stem}.py",), _ROUTE, _ROUTER),
    "moe_jax/grouped/*": (("tests/grouped",), ("tests/transport/test_ragged.py", "tests/nn")),
    "moe_jax/parallel/ragged.py": (("tests/parallel/test_ragged.py",), _EXCHANGE[1:]),
    "moe_jax/transport/ragged_exchange.py": (
        ("tests/transport/test_ragged_exchange.py",),
        _EXCHANGE[1:],
    ),
    "moe_jax/transport/ragged.py": (("tests/transport/test_ragged.py",), ("tests/nn",)),
    "moe_jax/transport/ring.py": (("tests/transport/test_table.py",), _EXCHANGE[1:]),
    "moe_jax/transport/*": (("tests/transport",), _LAYER),
    "moe_jax/parallel/exchange.py": (_EXCHANGE[:1], _EXCHANGE[1:], ("tests/parallel",)),
    "moe_jax/nn/moe.py": (_LAYER[:1], ("tests/nn", "tests/training/test_step.py")),
    "moe_jax/nn/router.py": (
        ("tests/nn/test_router.py", "tests/nn/test_moe.py"),
        (*_STEP, "tests/parallel/test_routers.py"),
    ),
    "moe_jax/training/step.py": (_STEP, ("tests/training",)),
    "moe_jax/training/loss.py": (("tests/training/test_loss.py",), _STEP),
}


def stages(name: str) -> list[list[str]]:
    """Returns the stages of test files for a changed file, the nearest tests first."""
    chosen = next(tests for pattern, tests in TESTS.items() if fnmatch.fnmatch(name, pattern))
    filled = [[test.format(stem=Path(name).stem) for test in stage] for stage in chosen]
    existing = ([test for test in stage if (ROOT / test).exists()] for stage in filled)
    return [stage for stage in existing if stage]


class Watch:
    """A pytest plugin that runs likely killers first and records the first test that fails."""

    def __init__(self, failed: Path, seconds: Path, killers: set[str]):
        self.failed, self.path, self.killers = failed, seconds, killers
        self.seconds = json.loads(seconds.read_text()) if seconds.exists() else {}

    def pytest_collection_modifyitems(self, items: list) -> None:
        """Orders the tests: killers of another mutation of the file first, then quick tests."""
        order = {item.path: number for number, item in reversed(list(enumerate(items)))}

        def key(item) -> tuple[bool, int, float]:
            seconds = self.seconds.get(item.nodeid, 1.0)
            return item.nodeid not in self.killers, order[item.path], seconds

        items.sort(key=key)

    def pytest_runtest_logreport(self, report) -> None:
        """Records the outcome and the duration of a test."""
        if report.failed and not self.failed.exists():
            self.failed.write_text(report.nodeid)
        if getattr(report, "when", "") == "call":
            self.seconds[report.nodeid] = round(report.duration, 2)

    pytest_collectreport = pytest_runtest_logreport

    def pytest_sessionfinish(self) -> None:
        """Saves the durations for later trials."""
        self.path.write_text(json.dumps(self.seconds))


def _tested(folder: Path, tests: list[str], deselected: list[str], killers: set[str]) -> int:
    """Runs tests in a copy of the project; the caller has forked this process for the tests."""
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if not Path(p or ".").is_relative_to(ROOT))]
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seconds = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "seconds.json"
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
    options += ["-m", ""]  # The tests of `make exhaustive` count too.
    options += [f"--deselect={test}" for test in deselected]
    return sys.modules["pytest"].main(
        [*options, *tests], plugins=[Watch(folder / "failed", seconds, killers)]
    )


def _ended(child: int, limit: float) -> bool:
    """Waits for a process, kills it after ``limit`` seconds, and returns whether it succeeded."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def passes(folder: Path, tests: list[str], killers: set[str], options: argparse.Namespace) -> bool:
    """Returns whether tests pass in a copy of the project, in a fork of this process."""
    child = os.fork()
    if child:
        return _ended(child, options.limit)
    code = 1
    try:
        code = int(_tested(folder, tests, options.deselect, killers))
    finally:
        os._exit(code)


def trial(mutation: Mutation, options: argparse.Namespace) -> str:
    """Returns the outcome of a mutation and the test that failed."""
    earlier = [line.split("\t") for line in lines() if line.startswith(mutation.path)]
    killers = {line[4] for line in earlier if line[3] == "killed"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            shutil.copytree(ROOT / part, folder / part)
        for part in LINKED:
            (folder / part).symlink_to(ROOT / part)
        (folder / mutation.path).write_text(mutation.applied())
        named = [options.tests] if options.tests else stages(mutation.path)[: options.stages]
        for stage in named:
            if not passes(folder, stage, killers, options):
                failed = folder / "failed"
                return f"killed\t{failed.read_text() if failed.exists() else 'out of time'}"
    return "survived\t"


def lines() -> list[str]:
    """Returns the lines of the result file."""
    return RESULT.read_text().splitlines() if RESULT.exists() else []


def prepare(cache: str) -> None:
    """Imports the libraries, but not the package; ``cache`` holds the compiled programs."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    Path(cache).mkdir(parents=True, exist_ok=True)
    for name in IMPORTED:
        importlib.import_module(name)


def main() -> None:
    """Tries the drawn mutations that have no line in the result file yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=120, help="number of mutations to draw")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--given", type=Path, help="file of mutations, instead of a draw")
    parser.add_argument("--only", default="*", help="pattern of the files to change")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a stage of tests")
    parser.add_argument("--deselect", action="append", default=[], help="test to skip")
    parser.add_argument(
        "--cache",
        default=tempfile.gettempdir() + "/mutate_cache",
        help="folder of compiled programs",
    )
    parser.add_argument("--stages", type=int, default=9, help="maximum number of stages of tests")
    parser.add_argument("--tests", nargs="+", help="test files to run instead")
    parser.add_argument("--list", action="store_true", help="print the mutations and try none")
    options = parser.parse_args()
    every = given(options.given) if options.given else drawn(options.seed)[: options.sample]
    known = {"\t".join(line.split("\t")[:3]) for line in lines()}
    prepare(options.cache)
    for mutation in every:
        if mutation.title in known or not fnmatch.fnmatch(mutation.path, options.only):
            continue
        if options.list:
            print(mutation.title)
            continue
        started = time.monotonic()
        line = f"{mutation.title}\t{trial(mutation, options)}"
        with RESULT.open("a") as file:
            file.write(line + "\n")
        print(f"{line}\t{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
