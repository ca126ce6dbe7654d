"""Samples text: ``python -m moe_jax.generate --workdir=runs/quickstart --prompt="def "``.

An encoder-decoder fills in blanks: ``--prompt="for i <extra_id_0> range(n):"``.

Nothing is dropped while sampling, so a text never depends on the others of its batch.
"""

from __future__ import annotations

import jax
from absl import flags

from moe_jax.cli import common
from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError
from moe_jax.run import workdir
from moe_jax.run.restored import open_restored
from moe_jax.run.sampling import generate

_WORKDIR = common.define_workdir()
_PROMPT = flags.DEFINE_string(
    "prompt", "def ", "Text to continue, or with <extra_id_0>, ... to fill in."
)
_TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens to add at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the best token.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k best; 0 for all.", lower_bound=0)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample among the fewest tokens that are together so likely; 1 for all."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Texts to sample.", lower_bound=1)


def main() -> None:
    """Restores the newest checkpoint and prints samples."""
    sampling = Sampling(_TOKENS.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value)
    folder = common.folder_of(_WORKDIR)
    layers = workdir.load(folder).model.sparse_layers()
    if any(layer.moe.router.experts_choose and layer.stack != "encoder" for layer in layers):
        raise ConfigError(
            "in this model experts choose among tokens, later ones included, so it cannot "
            "generate text; train a variant in which tokens choose experts"
        )
    _, session, state = open_restored(folder)
    with jax.set_mesh(session.mesh):
        for text in generate(session, state, [_PROMPT.value] * _SAMPLES.value, sampling):
            print(text)


if __name__ == "__main__":
    common.run(main)
