"""A small configuration of any architecture: known size fields become small, the rest stays as the architecture has it.

config = shrunken("llama")
config = shrunken("qwen2_moe", num_hidden_layers=3)          # the fields named are as given
config = shrunken("llava", text_config={"num_hidden_layers": 3})
"""

import inspect
import re
from typing import Any

import transformers

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 99


def stages(value: Any) -> Any:
    """Widths that grow from stage to stage, as many as there were."""
    return type(value)(range(16, 16 * (len(value) + 1), 16))


def ones(value: Any) -> Any:
    """One layer for each stage."""
    return type(value)([1] * len(value))


def same(value: Any) -> Any:
    """The width for each."""
    return type(value)([WIDTH] * len(value))


# What a field is called, and what it becomes; `None` leaves it as it is. The first pattern that fits the whole name counts.
STAGES: list[tuple[str, Any]] = [
    (r"depths|depth|layer_depths|num_block_repeats|.*num_layers|.*_layers", ones),
    (r"hidden_sizes|neck_hidden_sizes|embed_dims?|encoder_in_channels|dim_embed|embed_dim", stages),
    (r"conv_dim|tdnn_dim|decoder_in_channels|feat_.*dims?|intermediate_feature_dims", same),
]
SIZES: list[tuple[str, Any]] = [
    (r"vocab_size|text_vocab_size|src_vocab_size|tgt_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"type_vocab_size", None),
    (r"(num_|n_)?(image_|vision_|audio_)?(max_)?(n_)?positions?(_embeddings)?|max_position_embeddings|n_ctx|max_seq_len", 64),
    (r"(original_)?max_position_embeddings|max_2d_position_embeddings|max_source_positions|max_target_positions", 64),
    (r"sliding_window(_size)?|attention_window|local_attention|window_attention", 4),
    (r"image_size|pretrain_image_size|img_size", 16),
    (r"patch_size", 4),
    (r"num_mel_bins|input_feat_per_channel", 16),
    (r"head_dim|d_kv|d_head|(qk_nope|qk_rope|v|swa|swa_v|global|index|cross|dim|linear_key|linear_value|mamba|mamba_d)_head(_dim)?", 8),
    (r"attention_head_dim|attn_head_dim|kv_channels|mamba_d_head|dim_head", 8),
    (r"rotary_dim|qk_rope_head_dim", 8),
    (r"(.*_)?num_key_value_heads|num_kv_heads|linear_num_key_heads|num_key_value_heads_.*|n_kv_heads|multi_query_group_num", 2),
    (r"(.*_)?(num|n)_(attention_)?heads?|(.*_)?attention_heads|n_head|index_n_heads|linear_num_value_heads|.*_num_attention_heads", HEADS),
    (r"(.*_)?num_(hidden_)?layers|(.*_)?num_(encoder|decoder)_layers|(encoder|decoder|.*_encoder|.*_decoder)_layers|n_layers?|depth|layers|.*num_hidden_layers", LAYERS),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|mlp_dim|dff|dim_ff|ffn_hidden_size|linear_units|dim_feedforward|feedforward_dim)|d_inner", 48),
    (r"(n_routed|num|num_local|moe_num|n)_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts|num_experts_per_token|moe_top_k", 2),
    (r"n_group|topk_group|n_groups", 1),
    (r"expert_capacity", 64),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|.*_rank", 16),
    (r"(.*_)?state_size|mamba_d_state|d_state", 8),
    (r"chunk_size_feed_forward", None),
    (r"(.*_)?chunk_size(_.*)?", 4),
    (r"image_seq_length|num_queries|num_query_tokens|.*num_latents|mm_tokens_per_image", 4),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_dim|embedding_size|projection_dim|hidden_size_per_layer_input|emb_dim)", WIDTH),
    (r"dim|project_dim|out_hidden_size|output_channels|projector_dim|text_dim|latent_channels|output_dim|classifier_proj_size|lru_width|embed_proj_dim", WIDTH),
    (r"(codevector|proj_codevector|xvector_output)_dim|conv_channels|reduce_dim", WIDTH),
    (r"num_codevectors_per_group", 8),
    (r"num_conv_pos_embeddings", 8),
    (r"num_conv_pos_embedding_groups", 2),
    (r"num_hash_buckets", 64),
    (r"(.*_)?projection_size|coordinate_size|shape_size", 8),
]  # fmt: skip


def shrunken(model_type: str, **fields: Any) -> Any:
    """The small configuration of an architecture."""
    return _shrunken(type(transformers.AutoConfig.for_model(model_type)), fields)


def _shrunken(config_class: type, fields: dict[str, Any]) -> Any:
    """The class with small sizes, and, one by one, those that are given."""
    default = config_class()
    taken = inspect.signature(config_class.__init__).parameters
    small: dict[str, Any] = {}
    for name, parameter in taken.items():
        if (found := _small(name, parameter.default)) is not None:
            small[name] = found
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None and name in taken:
            given = fields.get(name, {})
            kind = type(part) if "model_type" not in given else type(transformers.AutoConfig.for_model(given["model_type"]))
            small[name] = _shrunken(kind, given)
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = HEADS  # latent attention makes a key for each head
    small |= {name: value for name, value in fields.items() if name not in config_class.sub_configs}
    return config_class(**{**_tokens(default, taken), **small})


def _small(name: str, value: Any) -> Any:
    """What a field becomes; `None` where it stays."""
    if isinstance(value, (list, tuple)):
        make = next((make for pattern, make in STAGES if re.fullmatch(pattern, name)), None)
        return make(value) if make and all(isinstance(each, int) for each in value) else None
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    return size if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _tokens(default: Any, taken: Any) -> dict[str, int]:
    """Ids of special tokens that a small vocabulary has, each its own."""
    names = [name for name in taken if re.fullmatch(r".*_token_(id|index)", name)]
    return {name: number for number, name in enumerate(names, 1) if isinstance(getattr(default, name, None), int)}
