"""Texts of models: which prompts a tokenizer can encode."""

from unittest.mock import Mock

import pytest

from moe_jax import data
from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError
from moe_jax.models import EncoderDecoder, EncoderDecoderConfig
from moe_jax.run.sampling import texts


def test_an_encoder_decoder_needs_a_tokenizer_with_sentinels():
    model = Mock(spec=EncoderDecoder, config=EncoderDecoderConfig())
    plain = data.open_tokenizer(data.DataConfig("mixture", tokenizer="bytes"))
    with pytest.raises(ConfigError, match="has no sentinels .*: pass token ids instead of texts"):
        texts(model, plain, ["for i <extra_id_0> range(n):"], Sampling())
