"""Base of the ablations: a small causal language model, and sizes for each scale."""

from __future__ import annotations

import sysconfig
from typing import Any

from ml_collections import ConfigDict
from moe_jax.configs import quickstart

from moe_jax.ablation.ablation import Changed, Finished, Gate

# One core trains an arm in about a minute and a half. The model is trained on about 50 tokens per
# parameter, so that more experts can lower the loss. Batches are small, because the number of steps
# limits the loss. One group is the whole batch, as on a TPU core. A window shuffles the rows, in
# validation too: a group that holds only rows of one long file would overload a few experts. The
# window holds about a third of the library, so each seed trains on another third of the text, and
# the spread over seeds includes the spread over texts. The committed results use this window and
# version 1.0.0 of the library, which contains tables of codecs and Unicode;
# ``data.shuffle_window=0`` would change the runs.
CPU: dict[str, Any] = {
    "model.num_layers": 2,
    "model.width": 32,
    "model.num_heads": 1,
    "model.mlp_dim": 128,
    "model.moe.expert_dim": 128,
    "model.moe.group_size": 2048,
    "data.vocab_size": 512,
    "data.seq_length": 128,
    "data.batch_size": 16,
    "data.shuffle_window": 16384,
    "data.eval_shuffle_window": 16384,
    "data.eval_documents": 32,
    "training.steps": 1000,
    "training.log_every": 2,
    "training.checkpoint_every": 1000,
}
# The regime of ``experiments/registration.md``: a small model that is trained until twice the
# tokens lower its loss by less than experts do. ``pilot/regime.py`` checks its gates.
SATURATED: dict[str, Any] = CPU | {
    "model.num_heads": 2,
    "model.head_dim": 16,
    "data.shuffle_window": 0,
    "data.eval_documents": None,
    "training.steps": 4000,
    "training.log_every": 10,
    "training.checkpoint_every": 4000,
}


def _installed_packages(_: ConfigDict) -> str:
    """Returns the source of all installed Python packages, about 130 MB beside this one."""
    return f"files:{sysconfig.get_path('purelib')}/**/*.py"


# 20 to 60 million active parameters and 105 million tokens, of text that every machine has: about
# three passes over the source of the installed packages.
GPU: dict[str, Any] = {
    "model.num_layers": 8,
    "model.width": 512,
    "model.num_heads": 8,
    "model.head_dim": 64,
    "model.mlp_dim": 2048,
    "model.moe.expert_dim": 2048,
    "model.moe.group_size": 2048,
    "model.compute_dtype": "bfloat16",
    "model.scan_layers": True,
    "data.source": _installed_packages,
    "data.seq_length": 512,
    "data.batch_size": 64,
    "data.shuffle_window": 8192,
    "data.eval_shuffle_window": 8192,
    "data.eval_documents": 200,
    "data.vocab_size": 8192,
    "training.steps": 3200,
    "training.checkpoint_every": 400,
}
POD: dict[str, Any] = GPU | {
    "model.num_layers": 12,
    "model.width": 768,
    "model.num_heads": 12,
    "model.mlp_dim": 3072,
    "model.moe.expert_dim": 3072,
    "data.source": "c4/en",
    "data.vocab_size": 32000,
    "data.batch_size": 2048,
    "data.shuffle_window": 65536,
    "data.eval_shuffle_window": 65536,
    "training.steps": 100_000,
    "training.checkpoint_every": 1000,
}
SCALES: dict[str, dict[str, Any]] = {"cpu": CPU, "gpu": GPU, "pod": POD}
# Scales of the registered ablations, with the rate that the pilot found.
REGISTERED: dict[str, dict[str, Any]] = SCALES | {
    "cpu": SATURATED | {"optimizer.learning_rate": 2e-2}
}


# The ragged transport has no slots; other transports of a dropless router need ``S`` per expert.
DROPLESS = {"model.moe.transport": "ragged"}


def balanced(
    k: int, weight: float, score: str = "Softmax", per_token: bool = False, **gates: Any
) -> dict[str, Any]:
    """Returns the settings of a dropless top-k router with a balance loss.

    Args:
        k: Number of experts per token.
        weight: Weight of the balance loss.
        score: Score function, ``Softmax`` or ``Sigmoid``.
        per_token: Whether the loss divides the scores of a token by their sum, as sigmoids need.
        **gates: Further settings of ``TopK``.
    """
    loss = {"type": "LoadBalance", "weight": weight, "choices": "mean", "per_token": per_token}
    parts = {
        "score": {"type": score},
        "select": {"type": "TopK", "k": k, **gates},
        "balance": [loss],
        "capacity": {"dropless": "always"},
    }
    return DROPLESS | {"model.moe.router": ConfigDict(parts)}


def language_model() -> ConfigDict:
    """Returns a decoder with a Switch layer in every other block, trained on Python source."""
    return quickstart.get_config("switch")


def saturated_model() -> ConfigDict:
    """Returns the base of registered ablations, with 16 experts in every layer."""
    config = language_model()
    config.model.moe.every = 1
    config.model.moe.num_experts = 16
    return config


def evaluated(arm: str, *change: str) -> dict[str, Any]:
    """Returns the settings that evaluate the run of an arm, changed by a command if one is given.

    Args:
        arm: Name of the trained arm.
        *change: Command of ``moe-jax`` and its flags, such as ``"prune", "--experts=8"``.
    """
    return {
        "training.start_from": Changed(arm, change[0], change[1:], trained_on=False)
        if change
        else Finished(arm, trained_on=False),
        # One step that is too small to change a weight.
        "training.steps": lambda _: 1,
        "optimizer.learning_rate": lambda _: 1e-30,
    }


def gates_from_one(config: ConfigDict) -> ConfigDict:
    """Returns Switch's router with gates times the number of experts: about one at the start."""
    parts = {
        "score": {"type": "Softmax"},
        "select": {"type": "TopK", "k": 1, "scale": float(config.model.moe.num_experts)},
        "balance": [{"type": "LoadBalance", "weight": 1e-2}],
        "capacity": {"factor": 1.25, "eval_factor": 2.0},
        "input_jitter": 1e-2,
    }
    return ConfigDict(parts)


def beats_zlib(arm: str = "dense") -> Gate:
    """Returns gate c: the arm needs fewer bits per byte of the validation text than zlib."""
    model = "the dense model" if arm == "dense" else f"the model of arm {arm}"
    text = f"{model} needs fewer bits per byte than zlib"
    return Gate(text, arm, "bits_above_zlib", most=0.0)


def _of_stacks(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a decoder as settings of both stacks of an encoder-decoder."""
    plain = {k: v for k, v in settings.items() if ".moe." not in k and k != "model.num_layers"}
    moe = {k.rsplit(".", 1)[1]: v for k, v in settings.items() if ".moe." in k}
    stacks = ("encoder_moe", "decoder_moe")
    both = {f"model.{stack}.{key}": value for stack in stacks for key, value in moe.items()}
    return plain | both


SPANS: dict[str, dict[str, Any]] = {
    "cpu": _of_stacks(CPU)
    | {
        "model.encoder_layers": 2,
        "model.decoder_layers": 2,
        "data.target_length": 32,
        "model.decoder_moe.group_size": 512,
    },
    "gpu": _of_stacks(GPU)
    | {
        "model.encoder_layers": 6,
        "model.decoder_layers": 6,
        "data.target_length": 128,
        "model.decoder_moe.group_size": 2048,
    },
    "pod": _of_stacks(POD)
    | {
        "model.encoder_layers": 12,
        "model.decoder_layers": 12,
        "data.target_length": 128,
        "model.decoder_moe.group_size": 2048,
    },
}
