"""Loss-Free Balancing section 5.2: expert choice leaks later tokens to a causal model.

The choice of an expert among the tokens of a chunk depends on all of them. In a smaller chunk, each
choice leaks more information about the next tokens, and the paper's loss is lower. As a control,
token choice without a balance loss and without drops does not depend on the chunk.
"""

from collections.abc import Callable

from ml_collections import ConfigDict
from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Published


def _whole(config: ConfigDict) -> int:
    # Larger chunk of the paper, or the whole batch if it is smaller.
    return min(8192, config.data.batch_size * config.data.seq_length)


def _sequence(config: ConfigDict) -> int:
    return config.data.seq_length


def _choice(chunk: Callable[[ConfigDict], int]) -> dict:
    return {
        "model.moe.router": router("expert_choice", capacity_factor=2.0, eval_capacity_factor=2.0),
        "model.moe.allow_future_leak": True,
        "model.moe.group_size": chunk,
    }


def _token(chunk: Callable[[ConfigDict], int]) -> dict:
    chosen = {"model.moe.router": router("loss_free", k=2), "model.moe.group_size": chunk}
    return DROPLESS | chosen


ABLATION = Ablation(
    name="expert_choice_leak",
    title="Expert Choice in a causal model: leak of later tokens, by chunk size",
    base=language_model,
    arms={
        "choice_whole": _choice(_whole),
        "choice_sequence": _choice(_sequence),
        "choice_64": _choice(lambda _: 64),
        "choice_16": _choice(lambda _: 16),
        # Attention reads a leak only in a later layer, so these arms have experts in both layers.
        "every_whole": _choice(_whole) | {"model.moe.every": 1},
        "every_sequence": _choice(_sequence) | {"model.moe.every": 1},
        "token_whole": _token(_whole),
        "token_16": _token(lambda _: 16),
    },
    scales=SCALES,
    published=(
        Published(
            "Wang et al. 2024 section 5.2 (2408.15664), chunks of 8192 and 512 tokens",
            "16 experts, 9 layers, 2 experts per token",
            "loss relative to the loss with the larger chunk, about",
            {"choice_whole": 1.0, "choice_sequence": 0.9},
        ),
    ),
    claims=(
        Claim(
            "Expert Choice within a sequence has a lower loss (more leak) than over the batch",
            "loss",
            "choice_sequence",
            "choice_whole",
            paper="Wang et al. 2024 section 5.2: about 10 % of the loss, 512 tokens against 8192",
        ),
        Claim(
            "Expert Choice within 64 tokens has a lower loss than over the batch",
            "loss",
            "choice_64",
            "choice_whole",
        ),
        Claim(
            "Expert Choice within 16 tokens has a lower loss than within 64",
            "loss",
            "choice_16",
            "choice_64",
        ),
        Claim(
            "With experts in every layer, a sequence has a lower loss than the batch",
            "loss",
            "every_sequence",
            "every_whole",
            paper="Wang et al. 2024 section 5.2: about 10 % of the loss, with 9 such layers",
        ),
        Claim(
            "Control: with token choice, the size of the group does not change the loss",
            "loss",
            "token_16",
            "token_whole",
            0.02,
            True,
        ),
    ),
    notes=(
        "Earlier runs read the validation files in order. A group of 2048 tokens then came from "
        "one file, unlike any group in training, and smaller chunks had a lower loss. With "
        "shuffled validation rows, validation and training agree: smaller chunks have a higher "
        "loss.",
        "Chunks down to 16 tokens were tried, and experts in both layers, so that the second "
        "layer can attend to leaked information. The published model has nine such layers and "
        "is trained for longer.",
    ),
)

get_config = ABLATION.get_config
