import pytest

from moe_jax.data import DataConfig, MixtureConfig


@pytest.mark.parametrize(
    "field",
    [
        {"seq_length": 0},
        {"batch_size": 0},
        {"vocab_size": -1},
        {"shuffle_window": -1},
        {"eval_shuffle_window": 0},
        {"prefetch": -1},
        {"eval_documents": 0},
        {"seed": -1},
    ],
)
def test_bad_field_is_named(field):
    with pytest.raises(ValueError, match=f"DataConfig.{next(iter(field))}") as error:
        DataConfig(**field)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field", [{"num_languages": 0}, {"num_symbols": 95}, {"concentration": 0.0}]
)
def test_bad_mixture_field_is_named(field):
    with pytest.raises(ValueError, match=f"MixtureConfig.{next(iter(field))}"):
        MixtureConfig(**field)
