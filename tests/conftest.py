"""Every test process sees 8 simulated devices, so multi-device tests are never skipped."""

import dataclasses
import functools
import itertools
import math
import os
import subprocess
import time
import zlib
from collections import defaultdict

from tests.xla import EIGHT_DEVICES, QUICK, keep_programs, share_contexts

os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), EIGHT_DEVICES, *QUICK])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The lines of Python in each lowered operation take a twentieth of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402

EXHAUSTIVE = Path(__file__).with_name("exhaustive.txt")
FIRST = ("tests/system", "tests/colab", "tests/ablation", "tests/experiments", "tests/training")
MOST_MAPS = 15_000  # of the 65,530 that Linux allows; one module adds some thousands
BEGAN = time.monotonic()
VERBOSITY = logging.get_verbosity()
share_contexts()
keep_programs(Path(__file__).parents[1] / ".cache" / "programs")


def pytest_addoption(parser):
    """Adds the time after which no test starts, for machines that stop a run which takes longer."""
    parser.addoption("--seconds", type=float, default=math.inf, help="skip tests that start later")


def pytest_runtest_setup(item):
    """Skips a test after the time of the run, and undoes the verbosity of an earlier command."""
    logging.set_verbosity(VERBOSITY)
    seconds = item.config.getoption("--seconds")
    if time.monotonic() - BEGAN > seconds:
        pytest.skip(f"not run: the {seconds:.0f} s of this run are over")


def pytest_sessionstart(session):
    """Fails the whole run rather than skipping what needs devices."""
    if jax.device_count() != 8:
        pytest.exit(f"tests need 8 simulated devices, found {jax.device_count()}", returncode=3)


@dataclasses.dataclass(frozen=True)
class Left:
    """Tests that ``make test`` leaves to ``make exhaustive``.

    Attributes:
        name: A folder, a file, a test or a case of one.
        part: Of so many cases of each test one stays; 0 for none.
    """

    name: str
    part: int = 0

    def of(self, tests_by_file):
        """Those of the tests that are left out: by a hash, so that rows and columns both stay."""
        by_function = defaultdict(list)
        for test in filter(self._names, self._among(tests_by_file)):
            by_function[test.split("[")[0]].append(test)
        left = set()
        for cases in by_function.values():
            staying = math.ceil(len(cases) / self.part) if self.part else 0
            left.update(sorted(cases, key=lambda case: zlib.crc32(case.encode()))[staying:])
        return left

    def _among(self, tests_by_file):
        file = self.name.split("::")[0]
        if file in tests_by_file:
            return tests_by_file[file]
        return itertools.chain.from_iterable(tests_by_file.values())  # The line names a folder.

    def concerns(self, file):
        """Whether the line names tests of a file."""
        return self._names(file) or self.name.startswith(f"{file}::")

    def whole(self, file):
        """Whether the line leaves out every test of a file."""
        return self._names(file) and not self.part

    def _names(self, test):
        name = self.name
        return test == name or (test.startswith(name) and test[len(name)] in "[:/")


@functools.cache
def left_to_exhaustive():
    """Returns the lines of ``exhaustive.txt``: ``NAME``, or ``NAME but 1/PART``."""
    lines = EXHAUSTIVE.read_text().splitlines()
    pairs = (line.partition(" but 1/") for line in lines if line and not line.startswith("#"))
    return [Left(name.strip(), int(part or 0)) for name, _, part in pairs]


def pytest_ignore_collect(collection_path, config):
    """Leaves out, without an import, files of which the expression of ``-m`` selects no test."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    file = str(collection_path.relative_to(config.rootpath))
    lines = [one for one in left_to_exhaustive() if one.concerns(file)]
    if config.option.markexpr == "exhaustive":
        # A file may mark cases itself, by a matrix.
        return (not lines and "matrix" not in collection_path.read_text()) or None
    whole = any(one.whole(file) for one in lines)
    return (whole and config.option.markexpr == "not exhaustive") or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks the tests that ``make test`` leaves out, and sorts the files."""
    by_file = defaultdict(set)
    for item in items:
        by_file[item.nodeid.split("::")[0]].add(item.nodeid)
    left = set().union(*(one.of(by_file) for one in left_to_exhaustive()))
    for item in items:
        if item.nodeid in left:
            item.add_marker(pytest.mark.exhaustive)
    limited = config.getoption("--seconds") < math.inf
    items.sort(key=by_commit(commit()) if limited else long_first)


def long_first(item):
    """Long files start first, so that no worker is left with one while the others have ended."""
    return not item.nodeid.startswith(FIRST)


def by_commit(name):
    """Returns a key that orders files anew for each commit: limited runs then leave out others."""
    return lambda item: zlib.crc32(f"{name}{item.nodeid.split('::')[0]}".encode())


def commit():
    """Returns the commit of the checkout, or "" outside of one."""
    command = ["git", "-C", str(EXHAUSTIVE.parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Frees them: thousands in one process pass the kernel's limit of memory maps, which aborts."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
