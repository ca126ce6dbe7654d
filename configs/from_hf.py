"""Fine-tuning of a released model: ``--config=from_hf:FOLDER``.

The folder holds a model of ``transformers`` (``config.json`` and safetensors) or the output of
``moe-jax convert``. The run takes model, weights and tokenizer from the folder. Overrides must not
change the function that the model computes.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.config.schema import settings
from moe_jax.data import Spans
from moe_jax.errors import ConfigError
from moe_jax.interop import folders
from moe_jax.models import EncoderDecoderConfig


def get_config(folder: str = "") -> ConfigDict:
    if not folder:
        raise ConfigError("name the folder: --config=from_hf:FOLDER")
    found = folders.describe(folder)
    config = common.base(f"tuned-{found.family}", found.config)
    longest = found.original.get("max_position_embeddings") or 2048

    config.data.tokenizer = folders.tokenizer_of(folder) or "bytes"
    config.data.vocab_size = found.vocab_size
    config.data.seq_length = min(2048, longest)
    config.data.batch_size = 8
    if isinstance(found.config, EncoderDecoderConfig):
        config.data.seq_length = 512
        config.data.target_length = 128
        config.data.spans = settings(Spans(sentinels=100))

    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 50

    config.training.start_from = folder
    config.training.steps = 500
    config.training.checkpoint_every = 100
    return config
