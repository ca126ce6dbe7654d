"""The keys of every family, with the defaults of ``transformers`` 5. The module is pure data."""

from __future__ import annotations

from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.unread import DERIVED, EVERYWHERE, NOBODY, TRAINING

FLAG = Key(bool, False)
ON = Key(bool, True)
NOT = Key(bool, False, only=(False,))
INDICES = Key(list, None, null=True, items=int)
NAMES = Key(list, None, null=True, items=str)
OBJECT = Key(dict, None, null=True)
_NO_WINDOW = Key(int, None, null=True, only=(None,))

# Keys of rotary positions, in the spelling of transformers 5 and in older ones.
ROTARY = {
    "max_position_embeddings": size(None),
    "original_max_position_embeddings": size(None, null=True),
    "partial_rotary_factor": number(None, null=True),
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "rope_theta": number(10000.0, null=True),
}
LLAMA = {
    **ROTARY,
    "head_dim": size(None, null=True),
    "hidden_act": Key(str, "silu"),
    "tie_word_embeddings": FLAG,
}
_QWEN = {
    **LLAMA,
    "vocab_size": size(151936),
    "hidden_size": size(2048),
    "num_hidden_layers": size(24),
    "max_position_embeddings": size(32768),
    "rms_norm_eps": number(1e-6, 0.0),
    "use_sliding_window": FLAG,
    "decoder_sparse_step": size(1),
    "norm_topk_prob": FLAG,
    "router_aux_loss_coef": number(0.001, 0.0),
    "mlp_only_layers": INDICES,
}
LATENT = {
    **{name: key for name, key in LLAMA.items() if name != "head_dim"},
    "attention_bias": NOT,
    "kv_lora_rank": size(512),
    "q_lora_rank": size(1536, null=True),
    "qk_nope_head_dim": size(128),
    "qk_rope_head_dim": size(64),
    "v_head_dim": size(128),
    "rms_norm_eps": number(1e-6, 0.0),
    "moe_layer_freq": Key(int, 1, only=(1,)),
    "aux_loss_alpha": number(None, 0.0, null=True),
}
_NO_CODE = dict.fromkeys(("ep_size", "seq_aux", "moe_loss_chunk"), NOBODY)
_LATENT_UNREAD = EVERYWHERE | _NO_CODE | {"qk_head_dim": DERIVED, "head_dim": DERIVED}

MIXTRAL = Keys(
    {
        **LLAMA,
        "vocab_size": size(32000),
        "hidden_size": size(4096),
        "intermediate_size": size(14336),
        "num_hidden_layers": size(32),
        "num_attention_heads": size(32),
        "num_key_value_heads": size(8, null=True),
        "max_position_embeddings": size(131072),
        "rms_norm_eps": number(1e-5, 0.0),
        "rope_theta": number(1000000.0, null=True),
        "sliding_window": size(None, null=True),
        "num_experts_per_tok": size(2),
        "num_local_experts": size(8),
        "router_aux_loss_coef": number(0.001, 0.0),
        "router_jitter_noise": number(0.0, 0.0),
    },
    EVERYWHERE,
    {"num_experts": "num_local_experts"},
)
LLAMA_7B = {
    **LLAMA,
    "vocab_size": size(32000),
    "hidden_size": size(4096),
    "intermediate_size": size(11008),
    "num_hidden_layers": size(32),
    "num_attention_heads": size(32),
    "num_key_value_heads": size(None, null=True),
    "max_position_embeddings": size(2048),
    "rms_norm_eps": number(1e-6, 0.0),
    "attention_bias": FLAG,
}
"""Keys of Llama, whose defaults are the sizes of Llama 7B."""

LLAMA_DENSE = Keys({**LLAMA_7B, "mlp_bias": NOT}, EVERYWHERE | {"pretraining_tp": NOBODY})
_DENSE_QWEN = {
    **LLAMA,
    "vocab_size": size(151936),
    "hidden_size": size(4096),
    "intermediate_size": size(22016),
    "num_hidden_layers": size(32),
    "num_attention_heads": size(32),
    "num_key_value_heads": size(32, null=True),
    "max_position_embeddings": size(32768),
    "rms_norm_eps": number(1e-6, 0.0),
    "use_sliding_window": FLAG,
    "sliding_window": size(4096, 0, null=True),
    "max_window_layers": size(28, 0),
    "layer_types": NAMES,
}
QWEN2 = Keys(_DENSE_QWEN, EVERYWHERE)
QWEN3 = Keys({**_DENSE_QWEN, "head_dim": size(128), "attention_bias": FLAG}, EVERYWHERE)
QWEN2_MOE = Keys(
    {
        **_QWEN,
        "intermediate_size": size(5632),
        "num_attention_heads": size(16),
        "num_key_value_heads": size(16, null=True),
        "sliding_window": size(4096, 0, null=True),
        "max_window_layers": size(28, 0),
        "layer_types": NAMES,
        "moe_intermediate_size": size(1408),
        "shared_expert_intermediate_size": size(5632),
        "num_experts_per_tok": size(4),
        "num_experts": size(60),
        "qkv_bias": ON,
    },
    EVERYWHERE,
    {"num_local_experts": "num_experts"},
)
QWEN3_MOE = Keys(
    {
        **_QWEN,
        "intermediate_size": size(6144),
        "num_attention_heads": size(32),
        "num_key_value_heads": size(4, null=True),
        "attention_bias": FLAG,
        "sliding_window": size(4096, null=True),
        "moe_intermediate_size": size(768),
        "num_experts_per_tok": size(8),
        "num_experts": size(128),
    },
    EVERYWHERE | {"max_window_layers": NOBODY, "layer_types": NOBODY},
    {"num_local_experts": "num_experts"},
)
OLMOE = Keys(
    {
        **LLAMA,
        "vocab_size": size(50304),
        "hidden_size": size(2048),
        "intermediate_size": size(2048),
        "num_hidden_layers": size(16),
        "num_attention_heads": size(16),
        "num_key_value_heads": size(None, null=True),
        "max_position_embeddings": size(4096),
        "rms_norm_eps": number(1e-5, 0.0),
        "attention_bias": FLAG,
        "clip_qkv": number(None, null=True),
        "sliding_window": _NO_WINDOW,
        "num_experts_per_tok": size(8),
        "num_experts": size(64),
        "router_aux_loss_coef": number(0.01, 0.0),
        "norm_topk_prob": FLAG,
    },
    EVERYWHERE,
    {"num_local_experts": "num_experts"},
)
DBRX = Keys(
    {
        **ROTARY,
        "d_model": size(2048),
        "n_heads": size(16),
        "n_layers": size(24),
        "max_position_embeddings": size(2048),
        "vocab_size": size(32000),
        "attn_config": OBJECT,
        "ffn_config": OBJECT,
        "rope_theta": number(None, null=True),
        "tie_word_embeddings": FLAG,
    },
    EVERYWHERE
    | {"num_key_value_heads": "attn_config has the key kv_n_heads"}
    | dict.fromkeys(("resid_pdrop", "emb_pdrop"), TRAINING)
    | {"router_aux_loss_coef": "ffn_config has the key moe_loss_weight"},
    {
        "max_seq_len": "max_position_embeddings",
        "num_attention_heads": "n_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
    },
    {
        "attn_config": Keys(
            {
                "kv_n_heads": size(1),
                "clip_qkv": number(None, null=True),
                "rope_theta": number(None, null=True),
            },
            EVERYWHERE | {"attn_pdrop": TRAINING},
        ),
        "ffn_config": Keys(
            {
                "ffn_act_fn": OBJECT,
                "ffn_hidden_size": size(3584),
                "moe_num_experts": size(4),
                "moe_top_k": size(1),
                "moe_jitter_eps": number(None, 0.0, null=True),
                "moe_loss_weight": number(0.01, 0.0),
                "moe_normalize_expert_weights": Key(float, 1.0, only=(1.0,)),
                "uniform_expert_assignment": NOT,
            },
            EVERYWHERE | {"hidden_size": DERIVED},
        ),
    },
)
DEEPSEEK_V2 = Keys(
    {
        **LATENT,
        "vocab_size": size(102400),
        "hidden_size": size(4096),
        "intermediate_size": size(11008),
        "moe_intermediate_size": size(1407),
        "num_hidden_layers": size(32),
        "num_attention_heads": size(32),
        "num_key_value_heads": size(None, null=True),
        "max_position_embeddings": size(2048),
        "mlp_bias": NOT,
        "first_k_dense_replace": size(0, 0),
        "n_group": size(None, null=True),
        "n_routed_experts": size(64),
        "n_shared_experts": size(2, 0, null=True),
        "norm_topk_prob": Key(bool, False, null=True, only=(False,)),
        "num_experts_per_tok": size(None),
        "routed_scaling_factor": number(1.0),
        "scoring_func": Key(str, "softmax", only=("softmax",)),
        "topk_group": size(None, null=True),
        "topk_method": Key(str, "greedy", only=("greedy", "group_limited_greedy")),
    },
    _LATENT_UNREAD,
    {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"},
)
DEEPSEEK_V3 = Keys(
    {
        **LATENT,
        "vocab_size": size(129280),
        "hidden_size": size(7168),
        "intermediate_size": size(18432),
        "moe_intermediate_size": size(2048),
        "num_hidden_layers": size(61),
        "num_attention_heads": size(128),
        "num_key_value_heads": size(128, null=True),
        "max_position_embeddings": size(4096),
        "first_k_dense_replace": size(3, 0),
        "n_group": size(8, null=True),
        "n_routed_experts": size(256),
        "n_shared_experts": size(1, 0, null=True),
        "norm_topk_prob": Key(bool, True, null=True),
        "num_experts_per_tok": size(8),
        "num_nextn_predict_layers": size(1, 0, null=True),
        "rope_interleave": Key(bool, True, null=True),
        "routed_scaling_factor": number(2.5),
        "scoring_func": Key(str, "sigmoid", only=("sigmoid",)),
        "topk_group": size(4, null=True),
        "topk_method": Key(str, "noaux_tc", only=("noaux_tc",)),
    },
    _LATENT_UNREAD,
    {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
)
LLAMA4 = Keys(
    {
        **LLAMA,
        "vocab_size": size(202048),
        "hidden_size": size(5120),
        "intermediate_size": size(8192),
        "intermediate_size_mlp": size(16384),
        "num_hidden_layers": size(48),
        "num_attention_heads": size(40),
        "num_key_value_heads": size(8, null=True),
        "head_dim": size(128, null=True),
        "max_position_embeddings": size(131072),
        "rms_norm_eps": number(1e-5, 0.0),
        "rope_theta": number(500000.0, null=True),
        "num_experts_per_tok": size(1),
        "num_local_experts": size(16),
        "moe_layers": INDICES,
        "interleave_moe_layer_step": size(1),
        "use_qk_norm": ON,
        "router_aux_loss_coef": number(0.001, 0.0),
        "no_rope_layers": INDICES,
        "no_rope_layer_interval": size(4),
        "attention_chunk_size": size(8192, null=True),
        "layer_types": NAMES,
        "attn_temperature_tuning": ON,
        "floor_scale": size(8192),
        "attn_scale": number(0.1),
        "attention_bias": FLAG,
    },
    EVERYWHERE | {"router_jitter_noise": NOBODY},
    {"num_experts": "num_local_experts"},
)
# Llama 4 with its vision tower: the configuration of the text model is one of the keys.
LLAMA4_OUTER = Keys(
    {"text_config": Key(dict, None)},
    EVERYWHERE
    | dict.fromkeys(
        (
            "boi_token_id",
            "boi_token_index",
            "eoi_token_id",
            "eoi_token_index",
            "image_token_id",
            "image_token_index",
            "vision_config",
        ),
        "the key belongs to the vision tower",
    )
    | {"tie_word_embeddings": "text_config has the key"},
)
GPT_OSS = Keys(
    {
        **LLAMA,
        "vocab_size": size(201088),
        "hidden_size": size(2880),
        "intermediate_size": size(2880),
        "num_hidden_layers": size(36),
        "num_attention_heads": size(64),
        "num_key_value_heads": size(8, null=True),
        "head_dim": size(64, null=True),
        "max_position_embeddings": size(131072),
        "rms_norm_eps": number(1e-5, 0.0),
        "rope_theta": number(150000.0, null=True),
        "sliding_window": size(128, null=True),
        "layer_types": NAMES,
        "num_experts_per_tok": size(4),
        "num_local_experts": size(128),
        "router_aux_loss_coef": number(0.001, 0.0),
        "swiglu_alpha": Key(float, 1.702, only=(1.702,)),
        "swiglu_limit": number(7.0, 0.0),
        "attention_bias": ON,
    },
    EVERYWHERE | dict.fromkeys(("experts_per_token", "initial_context_length"), NOBODY),
    {"num_experts": "num_local_experts"},
)
_CAPACITY = "the capacity of the router sets the slots; without drops the result is the same"
_ENCODER_DECODER = EVERYWHERE | {
    "router_dtype": "routers compute in float32",
    "expert_capacity": _CAPACITY,
}
SWITCH = Keys(
    {
        "vocab_size": size(32128),
        "d_model": size(768),
        "d_kv": size(64),
        "d_ff": size(2048),
        "num_layers": size(12),
        "num_decoder_layers": size(12, null=True),
        "num_heads": size(12),
        "num_experts": size(8),
        "num_sparse_encoder_layers": size(3, 0),
        "num_sparse_decoder_layers": size(3, 0),
        "encoder_sparse_step": size(None, 0, null=True),
        "decoder_sparse_step": size(None, 0, null=True),
        "router_bias": NOT,
        "router_jitter_noise": number(0.01, 0.0),
        "router_z_loss_coef": number(0.001, 0.0),
        "router_aux_loss_coef": number(0.001, 0.0),
        "add_router_probs": NOT,
        "relative_attention_num_buckets": size(32),
        "relative_attention_max_distance": size(128),
        "layer_norm_epsilon": number(1e-6, 0.0),
        "dense_act_fn": Key(str, "relu"),
        "is_gated_act": NOT,
        "tie_word_embeddings": ON,
    },
    _ENCODER_DECODER
    | {
        "dropout_rate": TRAINING,
        "initializer_factor": TRAINING,
        "feed_forward_proj": "the key dense_act_fn is read instead",
        "router_ignore_padding_tokens": NOBODY,
        "router_type": NOBODY,
        "batch_prioritized_routing": NOBODY,
        "n_positions": NOBODY,
        "output_past": NOBODY,
    },
    {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    },
)
NLLB_MOE = Keys(
    {
        "vocab_size": size(128112),
        "d_model": size(1024),
        "encoder_layers": size(12),
        "encoder_ffn_dim": size(4096),
        "encoder_attention_heads": size(16),
        "encoder_sparse_step": size(4, 0),
        "decoder_layers": size(12),
        "decoder_ffn_dim": size(4096),
        "decoder_attention_heads": size(16),
        "decoder_sparse_step": size(4, 0),
        "activation_function": Key(str, "relu"),
        "scale_embedding": ON,
        "pad_token_id": size(1, 0),
        "num_experts": size(128),
        "router_bias": NOT,
        "router_aux_loss_coef": number(0.001, 0.0),
        "router_ignore_padding_tokens": FLAG,
        "second_expert_policy": Key(str, "all", only=("all",)),
        "normalize_router_prob_before_dropping": FLAG,
        "batch_prioritized_routing": FLAG,
        "moe_eval_capacity_token_fraction": number(1.0),
        "moe_token_dropout": number(0.2, 0.0),
        "tie_word_embeddings": Key(bool, True, only=(True,)),
    },
    _ENCODER_DECODER
    | dict.fromkeys(
        ("activation_dropout", "dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std"),
        TRAINING,
    )
    | {
        "max_position_embeddings": "sinusoids are computed for every position",
        "router_z_loss_coef": NOBODY,
        "router_type": NOBODY,
        "router_jitter_noise": NOBODY,
    },
    {
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
    },
)
