"""Every test process sees 8 simulated devices, so multi-device tests are never skipped."""

import os

from tests.xla import EIGHT_DEVICES, QUICK

os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), EIGHT_DEVICES, *QUICK])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

EXHAUSTIVE = Path(__file__).with_name("exhaustive.txt")
MOST_MAPS = 15_000  # of the 65,530 that Linux allows; one module adds some thousands


def pytest_sessionstart(session):
    """Fails the whole run rather than skipping what needs devices."""
    if jax.device_count() != 8:
        pytest.exit(f"tests need 8 simulated devices, found {jax.device_count()}", returncode=3)


def left_to_exhaustive() -> tuple[str, ...]:
    """Returns the names in ``exhaustive.txt``: a folder, a file, a test or a case of one."""
    lines = EXHAUSTIVE.read_text().splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


def is_within(test: str, name: str) -> bool:
    """Whether a test is that of the name, a case of it, or in the file or folder of the name."""
    return test == name or (test.startswith(name) and test[len(name)] in "[:/")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the tests that ``make exhaustive`` runs and ``make test`` leaves out, by name."""
    names = left_to_exhaustive()
    for item in items:
        if any(is_within(item.nodeid, name) for name in names):
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Frees them: thousands in one process pass the kernel's limit of memory maps, which aborts."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
