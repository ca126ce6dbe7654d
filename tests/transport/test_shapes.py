"""The shapes and types in the annotations of transport and parallel are true for every row."""

from tests import annotations

CPUS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


def test_annotations_are_true_for_every_row_of_the_table():
    annotations.assert_true("tests.transport.checked_shapes", **CPUS)
