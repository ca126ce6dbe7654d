"""Each preset pins its published choices; what does not exist is refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import pytest

from moe_jax.errors import ConfigError
from moe_jax.ranges import Weight
from moe_jax.routing import (
    PRESETS,
    Active,
    Balance,
    Balanced,
    Bias,
    ByToken,
    Cap,
    Capacity,
    CommunicationBalance,
    ComputeBias,
    Cosine,
    DeviceBalance,
    Entropy,
    Everyone,
    Forced,
    FreeBalance,
    FreeExperts,
    GaussianNoise,
    Hash,
    Importance,
    LearnedNoise,
    Limit,
    Linear,
    Load,
    LoadBalance,
    NoHead,
    NormedLinear,
    PIBias,
    QuantileBias,
    Random,
    Relu,
    ResidualLinear,
    ResidualMLP,
    RoundedTopK,
    Router,
    Sampled,
    SecondBalance,
    Sigmoid,
    Sinkhorn,
    Softmax,
    SoftSlots,
    SparseMixer,
    SparsityLoss,
    SqrtSoftplus,
    Threshold,
    TokenBalance,
    Top2,
    TopGroups,
    TopK,
    TopP,
    TopTokens,
    TwoLevelSoftmax,
    Uniform,
    UnitSlots,
    ZLoss,
    choices_of,
    preset,
)

NAMES = [function.__name__ for function in PRESETS]

# Written out in full, each argument by position: a changed default of a part must not change a
# published router. The few shapes below recur.
SOFTMAX, SIGMOID = Softmax("experts", None), Sigmoid()
LINEAR = Linear(False, "scaled")
# factor, eval_factor, dropless, eval_fraction, minimum, multiple, rounding, per_choice, priority,
# reroute, devices, renormalize
DROPLESS = Capacity(1.25, 2.0, "always", 0.0, 4, 1, "ceil", False, "choice", False, 0, False)
MESH = Capacity(1.25, 2.0, "never", 0.0, 4, 1, "floor", False, "choice", False, 0, False)
CEIL = Capacity(1.25, 2.0, "never", 0.0, 4, 1, "ceil", False, "choice", False, 0, False)
GSHARD = Capacity(2.0, 2.0, "never", 0.0, 1, 1, "ceil", False, "choice", False, 0, False)
EXPERT_CHOICE = Capacity(2.0, 2.0, "never", 0.0, 1, 1, "floor", False, "choice", False, 0, False)
# head, input_jitter, gate_on, precision, mask_padding, input_dropout
PLAIN = (LINEAR, 0.0, "out", "float32", True, 0.0)
JITTER = (LINEAR, 1e-2, "out", "float32", True, 0.0)
UNMASKED = (LINEAR, 0.0, "out", "float32", False, 0.0)


def top_k(k: int, normalize: bool = False) -> TopK:
    return TopK(k, normalize, 1.0, None, None)


def balance(weight: float, choices: str, padding: str, per_token: bool = False) -> LoadBalance:
    return LoadBalance(weight, choices, padding, per_token, 0.0, "balance")


def of_sequences(loss: Balance) -> Balance:
    return dataclasses.replace(loss, span="sequence")


OF_DEEPSEEK_V3 = of_sequences(balance(1e-4, "mean", "masked", True))


def biased(k: int, scale: float) -> TopK:
    return TopK(k, True, scale, Bias(1e-3, "sign"), None)


PUBLISHED = {
    "jacobs_1991": Router(SOFTMAX, Everyone(), (), DROPLESS, *PLAIN),
    # Both losses at 0.1; softmax over the k kept logits; both maps start at zero.
    "noisy_top_k": Router(
        Softmax("experts", LearnedNoise()),
        top_k(4, True),
        (Importance(0.1, "gates", "importance"), Load(0.1, True, "load")),
        DROPLESS,
        Linear(False, "zeros"),
        0.0,
        "out",
        "float32",
        True,
        0.0,
    ),
    # Two of the groups, two experts in each.
    "hierarchical": Router(
        TwoLevelSoftmax(4),
        TopGroups(4, 2, 2),
        (Importance(0.1, "gates", "importance"),),
        DROPLESS,
        *PLAIN,
    ),
    # Capacity 2N/(GE) with S = N/G: factor 2. Probability min(1, 2 * g2): threshold 1/2.
    "gshard": Router(
        SOFTMAX,
        Top2("random", 0.5, True, True),
        (balance(1e-2, "first", "masked"),),
        GSHARD,
        *PLAIN,
    ),
    "glam": Router(
        SOFTMAX,
        Top2("all", 0.5, True, True),
        (balance(1e-2, "first", "masked"),),
        GSHARD,
        *PLAIN,
    ),
    "top2_mtf": Router(
        SOFTMAX,
        Top2("random", 0.2, False, True),
        (balance(1e-2, "first", "diluted"),),
        MESH,
        *PLAIN,
    ),
    "switch": Router(SOFTMAX, top_k(1), (balance(1e-2, "first", "masked"),), CEIL, *JITTER),
    "switch_mtf": Router(SOFTMAX, top_k(1), (balance(1e-2, "first", "counted"),), MESH, *JITTER),
    # round(CF * S / E), no jitter, N(0, 0.02).
    "switch_t5x": Router(
        SOFTMAX,
        top_k(1),
        (balance(1e-2, "all", "diluted"),),
        Capacity(1.25, 2.0, "never", 0.0, 4, 1, "round", False, "choice", False, 0, False),
        Linear(False, "normal"),
        0.0,
        "out",
        "float32",
        True,
        0.0,
    ),
    "switch_max": Router(
        SOFTMAX,
        top_k(1),
        (balance(1e-2, "first", "counted"),),
        Capacity(1.25, 2.0, "never", 0.0, 4, 1, "floor", False, "score", False, 0, False),
        *JITTER,
    ),
    # ntlb_top_k = 4.
    "no_token_left_behind": Router(
        SOFTMAX,
        top_k(4),
        (balance(1e-2, "mean", "counted"),),
        Capacity(1.25, 2.0, "never", 0.0, 4, 1, "floor", False, "choice", True, 0, False),
        *JITTER,
    ),
    # Noise of 1/E, both losses at 0.005, ceil(S K 1.05 / E) to a multiple of 4.
    "vmoe": Router(
        Softmax("experts", GaussianNoise(1.0)),
        top_k(2),
        (Importance(5e-3, "scores", "importance"), Load(5e-3, False, "load")),
        Capacity(1.05, 1.05, "never", 0.0, 1, 4, "ceil", True, "score", False, 0, False),
        *PLAIN,
    ),
    "st_moe": Router(
        SOFTMAX,
        Top2("random", 0.2, False, True),
        (balance(1e-2, "first", "masked"), ZLoss(1e-3, "masked", "z")),
        CEIL,
        *PLAIN,
    ),
    # Loss weight 1, int(1.0 * ceil(S / E)) slots, a quarter of the tokens in evaluation.
    "fairseq_top1": Router(
        SOFTMAX,
        top_k(1),
        (balance(1.0, "first", "unsent"),),
        Capacity(1.0, 1.0, "never", 0.25, 1, 1, "share", False, "choice", False, 0, False),
        *UNMASKED,
    ),
    # Raw gates, renormalised over survivors; 2 * ceil(S / E) slots.
    "fairseq_top2": Router(
        SOFTMAX,
        Top2("sampling", 0.5, False, False),
        (balance(1.0, "first", "unsent"),),
        Capacity(2.0, 2.0, "never", 0.25, 1, 1, "share", False, "choice", False, 0, True),
        *UNMASKED,
    ),
    # 16 dimensions; forces gates normalised before dropping and the random second expert.
    "xmoe": Router(
        SOFTMAX,
        Top2("random", 0.5, False, True),
        (balance(1e-2, "first", "unsent"),),
        Capacity(2.0, 2.0, "never", 0.25, 1, 1, "share", False, "choice", False, 0, False),
        Cosine(16, False),
        0.0,
        "out",
        "float32",
        True,
        0.0,
    ),
    "base": Router(
        SIGMOID,
        Balanced(1e-3, 2000),
        (),
        Capacity(1.0, 2.0, "eval", 0.0, 1, 1, "ceil", False, "choice", False, 0, False),
        *PLAIN,
    ),
    "sinkhorn": Router(
        SOFTMAX,
        TopK(1, False, 1.0, Sinkhorn(30), None),
        (),
        Capacity(2.0, 2.0, "never", 0.0, 4, 1, "ceil", False, "choice", False, 0, False),
        *PLAIN,
    ),
    "hash": Router(
        Uniform(), Hash("random", 32000, 0), (), DROPLESS, NoHead(), 0.0, "out", "float32", True
    ),
    # k = n * c / e tokens per expert, no auxiliary loss.
    "expert_choice": Router(SOFTMAX, TopTokens(False, None), (), EXPERT_CHOICE, *PLAIN),
    # lambda = 0.001, at most 100 iterations, EC-CAP2.
    "expert_choice_capped": Router(
        SOFTMAX, TopTokens(False, Cap(2, 1e-3, 100)), (), EXPERT_CHOICE, *PLAIN
    ),
    "expert_choice_mtf": Router(
        Softmax("tokens", None),
        TopTokens(True, None),
        (TokenBalance(1e-2, "token_balance"),),
        MESH,
        *JITTER,
    ),
    "soft_moe": Router(
        Uniform(), SoftSlots(1), (), CEIL, UnitSlots(), 0.0, "out", "float32", True, 0.0
    ),
    "adaptive_top_p": Router(
        SOFTMAX,
        TopP(0.4, 4),
        (balance(1e-2, "all", "masked"), Entropy(1e-4, "entropy")),
        DROPLESS,
        *PLAIN,
    ),
    "mixtral": Router(SOFTMAX, top_k(2, True), (balance(0.02, "all", "masked"),), DROPLESS, *PLAIN),
    # 4 of 16, loss 0.05, gates divided by their L1 norm.
    "dbrx": Router(SOFTMAX, top_k(4, True), (balance(0.05, "all", "masked"),), DROPLESS, *PLAIN),
    # 8 of 64 without renormalisation, 0.01 and 0.001.
    "olmoe": Router(
        SOFTMAX,
        top_k(8),
        (balance(1e-2, "mean", "masked"), ZLoss(1e-3, "masked", "z")),
        DROPLESS,
        *PLAIN,
    ),
    "qwen2_moe": Router(SOFTMAX, top_k(4), (balance(1e-3, "all", "masked"),), DROPLESS, *PLAIN),
    "qwen3_moe": Router(
        SOFTMAX,
        top_k(8, True),
        (dataclasses.replace(balance(1e-3, "all", "masked"), over="batch"),),
        DROPLESS,
        *PLAIN,
    ),
    # The losses of DeepSeek's models are of each sequence.
    # alpha_1 = 0.001 at 16B, whose experts sit on one device: no device loss.
    "deepseek_moe": Router(
        SOFTMAX, top_k(6), (of_sequences(balance(1e-3, "mean", "masked")),), DROPLESS, *PLAIN
    ),
    # alpha 0.003, 0.05, 0.02; M = 3 of D = 8; factor 16; drops in training.
    "deepseek_v2": Router(
        SOFTMAX,
        TopK(6, False, 16.0, None, Limit(8, 3, "max")),
        (
            of_sequences(balance(3e-3, "mean", "masked")),
            of_sequences(DeviceBalance(0.05, 8, "device_balance")),
            of_sequences(CommunicationBalance(0.02, 8, 3, "communication_balance")),
        ),
        Capacity(1.0, 2.0, "eval", 0.0, 4, 1, "ceil", False, "choice", False, 8, False),
        *PLAIN,
    ),
    # gamma = 0.001, alpha = 0.0001, 4 of 8 groups by their two best, factor 2.5.
    "deepseek_v3": Router(
        SIGMOID,
        TopK(8, True, 2.5, Bias(1e-3, "sign"), Limit(8, 4, "top2")),
        (of_sequences(balance(1e-4, "mean", "masked", True)),),
        DROPLESS,
        *PLAIN,
    ),
    "loss_free": Router(
        SIGMOID, TopK(6, False, 1.0, Bias(1e-3, "sign"), None), (), DROPLESS, *PLAIN
    ),
    # Scales what goes into the expert.
    "llama4": Router(
        SIGMOID,
        top_k(1),
        (balance(1e-3, "mean", "masked", True),),
        DROPLESS,
        LINEAR,
        0.0,
        "in",
        "float32",
        True,
        0.0,
    ),
    "gpt_oss": Router(
        SOFTMAX,
        top_k(4, True),
        (balance(0.9, "all", "masked"),),
        DROPLESS,
        Linear(True, "scaled"),
        0.0,
        "out",
        "float32",
        True,
        0.0,
    ),
    # No groups; the loss of each sequence. 1 in GLM-4.5-Air, 2.827 in Kimi K2, 1.5 in DeepSeek-V4.
    "glm4_moe": Router(SIGMOID, biased(8, 1.0), (OF_DEEPSEEK_V3,), DROPLESS, *PLAIN),
    "kimi_k2": Router(SIGMOID, biased(8, 2.827), (OF_DEEPSEEK_V3,), DROPLESS, *PLAIN),
    "minimax_m2": Router(
        SIGMOID,
        biased(8, 1.0),
        (dataclasses.replace(OF_DEEPSEEK_V3, weight=1e-3),),
        DROPLESS,
        *PLAIN,
    ),
    "deepseek_v4": Router(SqrtSoftplus(), biased(6, 1.5), (OF_DEEPSEEK_V3,), DROPLESS, *PLAIN),
    "deepseek_v4_hash": Router(
        SqrtSoftplus(), TopK(6, True, 1.5, ByToken(0, ""), None), (), DROPLESS, *PLAIN
    ),
    # beta = 0.01, tau = 0.75; two constant experts, a copy and a zero.
    "moe_plus_plus": Router(
        SOFTMAX,
        top_k(2),
        (FreeBalance(1e-2, 4, 0.75, "balance"),),
        DROPLESS,
        ResidualLinear(),
        *PLAIN[1:],
        FreeExperts(2, 1, 1),
    ),
    # 12 of 512 + 256 with factor 6; 8 of the 12 compute.
    "longcat_flash": Router(
        SOFTMAX,
        TopK(12, False, 6.0, ComputeBias(1e-3, 256, 2 / 3), None),
        (),
        DROPLESS,
        *PLAIN,
        FreeExperts(0, 256, 0),
    ),
    # The default configurations of transformers.
    "gemma4": Router(
        SOFTMAX,
        TopK(8, True, 1.0, None, None, True),
        (balance(1e-2, "all", "masked"),),
        DROPLESS,
        NormedLinear(1e-6),
        0.0,
        "out",
        "float32",
        True,
        0.0,
    ),
    "zaya": Router(
        SOFTMAX,
        TopK(1, False, 1.0, ComputeBias(1e-3, 1, 1.0, -1.0), None),
        (),
        DROPLESS,
        ResidualMLP(256, 1e-5),
        0.0,
        "out",
        "float32",
        True,
        0.0,
        FreeExperts(0, 0, 1),
    ),
    "phimoe": Router(
        SOFTMAX, SparseMixer(2, 0.01), (balance(1e-3, "all", "masked"),), DROPLESS, *PLAIN
    ),
    # Tiles of 128 tokens.
    "token_rounding": Router(
        SOFTMAX,
        RoundedTopK(8, 128, "nearest"),
        (balance(1e-2, "all", "masked"),),
        DROPLESS,
        *PLAIN,
    ),
    # lambda from 1e-8 by factors of 1.2.
    "remoe": Router(Relu(), Active(2), (SparsityLoss(1e-8, 2, 1.2, "sparsity"),), DROPLESS, *PLAIN),
    "expert_threshold": Router(SIGMOID, Threshold(1, 0.99, 128), (), DROPLESS, *PLAIN),
    # Sigmoids over their sum, no loss.
    "quantile_balancing": Router(
        SIGMOID, TopK(8, True, 1.0, QuantileBias(0.0, 128), None), (), DROPLESS, *PLAIN
    ),
    "pi_balancing": Router(
        SIGMOID, TopK(8, True, 1.0, PIBias(1e-3, 1e-2), None), (), DROPLESS, *PLAIN
    ),
    "ernie4_5_moe": Router(
        SOFTMAX, biased(6, 1.0), (balance(1e-3, "all", "masked"),), DROPLESS, *PLAIN
    ),
    "cohere2_moe": Router(
        SOFTMAX, top_k(2, True), (balance(1e-2, "all", "masked"),), DROPLESS, *PLAIN
    ),
    "random": Router(
        Uniform(), Random(1), (), DROPLESS, NoHead(), 0.0, "out", "float32", True, 0.0
    ),
    "forced": Router(SOFTMAX, Forced(1, False, 1.0), (), DROPLESS, *PLAIN),
}


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_the_published_choice(name: str):
    assert name in PUBLISHED, "write out here what the new preset publishes"
    assert preset(name) == PUBLISHED[name]


def test_nothing_is_written_out_that_is_not_there():
    assert set(PUBLISHED) == set(NAMES) and len(NAMES) == len(set(NAMES))


def functions() -> dict:
    return {function.__name__: function for function in PRESETS}


@pytest.mark.parametrize("name", NAMES)
def test_presets_have_names_sources_and_hashes(name: str):
    function = functions()[name]
    assert function.__doc__
    assert preset(name) == function()
    hash(preset(name))
    assert set(choices_of(name)) == set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_presets_say_over_which_tokens_a_balance_loss_is_taken(name: str):
    # Z-loss and entropy are means over tokens, whichever tokens lie together.
    spread = [loss for loss in preset(name).balance if not isinstance(loss, ZLoss | Entropy)]
    said = " ".join(functions()[name].__doc__.split())
    tokens = [
        "over the global batch" if loss.over == "batch" else f"per {loss.span}" for loss in spread
    ]
    assert all(words in said for words in tokens)


# A choice that a preset's default makes void, and what gives it something to choose.
VOID = {
    ("deepseek_moe", "devices"): {"device_weight": 0.05},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_changes_the_router(name: str):
    function = functions()[name]
    hints = typing.get_type_hints(function)
    for choice, parameter in inspect.signature(function).parameters.items():
        beside = VOID.get((name, choice), {})
        if hints[choice] is bool:
            values = [False, True]
        elif hints[choice] == float | None:
            values = [0.5, None]
        elif hints[choice] is str:
            values = ["", "table.npy"]
        else:
            further = 0.25 if hints[choice] is float else 1
            further = -further if parameter.default == 0.99 else further
            values = typing.get_args(hints[choice]) or [parameter.default + further]
        for new in values:
            same = preset(name, **beside, **{choice: new}) == preset(name, **beside)
            assert same == (new == parameter.default), (choice, new)


def test_choices_reach_their_parts():
    assert preset("switch", capacity_factor=1.0).capacity.factor == 1.0
    assert preset("switch", eval_capacity_factor=3.0).capacity.eval_factor == 3.0
    assert preset("switch", z_weight=1e-3).balance == (LoadBalance(1e-2), ZLoss(1e-3))
    assert preset("switch", sample=True).select == TopK(1, rank=Sampled())
    assert preset("switch", input_dropout=0.1).input_dropout == 0.1
    assert preset("switch_mtf", priority="score").capacity.priority == "score"
    assert preset("gshard", second="none").select.second == "none"
    assert preset("top2_mtf", threshold=0.3).select.threshold == 0.3
    both = preset("top2_mtf", second_balance_weight=5e-3).balance
    assert both == (LoadBalance(1e-2, padding="diluted"), SecondBalance(5e-3))
    assert preset("expert_choice", over="tokens").score.over == "tokens"
    assert preset("expert_choice", z_weight=1e-3).balance == (ZLoss(1e-3),)
    # A dropless model with slots counts them per assignment.
    slots = preset("olmoe", capacity_factor=1.5).capacity
    assert (slots.factor, slots.eval_factor, slots.per_choice) == (1.5, 1.5, True)
    assert slots.dropless == "never"
    devices = of_sequences(DeviceBalance(0.05, 8))
    assert preset("deepseek_moe", device_weight=0.05).balance[1] == devices
    assert preset("deepseek_v3", span="group").balance[0].span == "group"
    # fairseq: a negative fraction asks for the training formula; gates divided before or after.
    assert preset("fairseq_top2", eval_token_fraction=-1.0).capacity.eval_fraction == 0
    before = preset("fairseq_top2", normalize_before_dropping=True)
    assert before.select.normalize and not before.capacity.renormalize


def test_loss_weights_go_by_name():
    router = preset("top2_mtf", balance_weight=0.5, second_balance_weight=0.25)
    assert router.loss_weights == {"balance": 0.5, "second_balance": 0.25}


def test_a_choice_has_its_type_and_on_request_its_range():
    assert choices_of("switch")["balance_weight"] is float
    assert choices_of("switch", with_ranges=True)["balance_weight"] == Weight


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown router 'swich'; did you mean 'switch'") as e:
        preset("swich")
    assert "\n" not in str(e.value)
    assert all(name in str(e.value) for name in NAMES)


def test_unknown_choice_names_the_nearest():
    match = "router 'switch' has no choice 'capacity_facter'; did you mean 'capacity_factor'"
    with pytest.raises(ConfigError, match=match):
        preset("switch", capacity_facter=1.0)
    with pytest.raises(ConfigError, match="has no choice 'second'"):
        preset("switch", second="all")


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_a_capacity_factor_of_a_model_without_dropping_counts_every_choice(name: str):
    # An even share of 64 tokens' 128 choices is 16 for each of 8 experts.
    router = preset(name, k=2, capacity_factor=1.0)
    assert {router.slots(64, 8, train=train) for train in (True, False)} == {16}


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_dropout_of_everything_is_refused(rate: float):
    with pytest.raises(ConfigError, match=rf"switch\.input_dropout={rate} must be at least 0"):
        preset("switch", input_dropout=rate)


def test_a_weight_of_zero_leaves_the_loss_out():
    assert preset("switch", balance_weight=0.0).balance == ()
    assert dataclasses.replace(preset("vmoe", load_weight=0.0)).loss_weights == {"importance": 5e-3}
