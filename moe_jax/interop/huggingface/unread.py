"""Keys of ``config.json`` that no family reads, each with the reason. The module is pure data."""

from __future__ import annotations

FILE = "the key describes the file, not the model"
TOKENS = "the key belongs to the tokenizer, which is loaded separately"
GENERATION = "the key is a default of generation, which has settings of its own"
TRAINING = "the key is a setting of training, which the configuration of a run holds"
REPORT = "the key selects the outputs that transformers returns"
PLATFORM = "the key selects an implementation in transformers, with the same result"
DERIVED = "transformers derives the key from other keys"
NOBODY = "no code of transformers reads the key in this family"

EVERYWHERE = {
    **dict.fromkeys(
        ("architectures", "auto_map", "model_type", "name_or_path", "transformers_version"), FILE
    ),
    **dict.fromkeys(("dtype", "torch_dtype", "for_llm_compressor", "task_specific_params"), FILE),
    "quantization_config": "the key is read together with the tensors",
    **dict.fromkeys(
        (
            "bos_token_id",
            "decoder_start_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "tokenizer_class",
        ),
        TOKENS,
    ),
    "prefix": TOKENS,
    **dict.fromkeys(
        (
            "assistant_confidence_threshold",
            "assistant_lookbehind",
            "bad_words_ids",
            "begin_suppress_tokens",
            "cache_implementation",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "encoder_repetition_penalty",
            "epsilon_cutoff",
            "eta_cutoff",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "max_new_tokens",
            "min_length",
            "no_repeat_ngram_size",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_scores",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict_in_generate",
            "suppress_tokens",
            "target_lookbehind",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
            "use_cache",
        ),
        GENERATION,
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        REPORT,
    ),
    **dict.fromkeys(
        (
            "attn_implementation",
            "chunk_size_feed_forward",
            "experts_implementation",
            "pretraining_tp",
            "torchscript",
            "use_bfloat16",
            "tie_last_hidden_states",
        ),
        PLATFORM,
    ),
    **dict.fromkeys(
        ("finetuning_task", "id2label", "label2id", "num_labels", "problem_type"),
        "the key belongs to classifiers",
    ),
    **dict.fromkeys(
        (
            "add_cross_attention",
            "cross_attention_hidden_size",
            "is_decoder",
            "is_encoder_decoder",
            "pruned_heads",
            "tf_legacy_loss",
            "tie_encoder_decoder",
        ),
        "the architecture of the family determines the key",
    ),
    **dict.fromkeys(
        ("attention_dropout", "initializer_range", "unsloth_fixed", "unsloth_version"), TRAINING
    ),
}
