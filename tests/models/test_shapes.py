"""The shapes and types in the annotations of ``moe_jax.models`` are true for both models."""

from tests import annotations


def test_annotations_are_true_for_both_models():
    annotations.assert_true("tests.models.checked_shapes")
