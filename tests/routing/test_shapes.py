"""The shapes and types in the annotations of ``moe_jax.routing`` are true on every preset."""

from tests import annotations


def test_annotations_are_true_on_every_preset():
    annotations.assert_true("tests.routing.checked_shapes")
