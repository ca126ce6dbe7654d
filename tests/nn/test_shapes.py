"""The shapes and types in the annotations of ``moe_jax.nn`` are true in models of every kind."""

from tests import annotations


def test_annotations_are_true_in_models_of_every_kind():
    annotations.assert_true("tests.nn.checked_shapes")
