"""Every test process sees 8 simulated devices, so multi-device tests are never skipped."""

import os

from tests.xla import EIGHT_DEVICES, QUICK

os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), EIGHT_DEVICES, *QUICK])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

MOST_MAPS = 15_000  # of the 65,530 that Linux allows; one module adds some thousands


def pytest_sessionstart(session):
    """Fails the whole run rather than skipping what needs devices."""
    if jax.device_count() != 8:
        pytest.exit(f"tests need 8 simulated devices, found {jax.device_count()}", returncode=3)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Frees them: thousands in one process pass the kernel's limit of memory maps, which aborts."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
