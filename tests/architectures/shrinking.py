"""A small configuration of any architecture: known size fields become small, the rest stays as the architecture has it.

config = shrunken("llama")
config = shrunken("qwen2_moe", num_hidden_layers=3)          # the fields named are as given
config = shrunken("llava", text_config={"num_hidden_layers": 3})
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import transformers

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 99


def growing(value: Any) -> Any:
    """Widths that grow from stage to stage, as many as there were."""
    return type(value)(range(16, 16 * (len(value) + 1), 16))


def alike(value: Any) -> Any:
    """The width for each stage."""
    return type(value)([WIDTH] * len(value))


def single(value: Any) -> Any:
    """One layer for each stage."""
    return type(value)([1] * len(value))


# What a field is called, and what it becomes; the first pattern that fits the whole name counts, and `None` leaves it as it is.
STAGES: list[tuple[str, Callable[[Any], Any]]] = [
    (r"depths?|layer_depths|num_block_repeats|.*num_layers|.*_layers", single),
    (r"(neck_)?hidden_sizes|embed_dims?|encoder_in_channels|dim_embed", growing),
    (r"conv_dim|tdnn_dim|decoder_in_channels|feat_.*dims?|intermediate_feature_dims", alike),
]
SIZES: list[tuple[str, int | None]] = [
    (r"((text|src|tgt|unpadded)_)?vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"(original_)?max_position_embeddings|num_position_embeddings|n_positions|n_ctx|max_seq_len", 64),
    (r"max_2d_position_embeddings|max_(source|target)_positions", 64),
    (r"sliding_window(_size)?|attention_window|local_attention|window_attention", 4),
    (r"image_size|pretrain_image_size|img_size|num_mel_bins|input_feat_per_channel", 16),
    (r"patch_size", 4),
    # attention
    (r"((qk_nope|qk_rope|v|mamba|swa|swa_v|global|index|cross|linear_key|linear_value|attention|attn)_)?head_dim", 8),
    (r"d_kv|d_head|dim_head|kv_channels|mamba_d_head|rotary_dim", 8),
    (r"(.*_)?num_key_value_heads|num_key_value_heads_.*|(num|n)_kv_heads|linear_num_key_heads", 2),
    (r"(.*_)?(num|n)_(attention_)?heads?|(.*_)?attention_heads|linear_num_value_heads", HEADS),
    # layers
    (r"(.*_)?num_(hidden_)?layers|(.*_)?num_(encoder|decoder)_layers", LAYERS),
    (r"(.*_)?(encoder|decoder)_layers|n_layers?|depth|layers", LAYERS),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|mlp_dim|dff|dim_ff|ffn_hidden_size)|d_inner", 48),
    (r"(.*_)?(linear_units|dim_feedforward|feedforward_dim)", 48),
    # mixtures of experts, latent attention, state spaces
    (r"(n_routed|num|num_local|moe_num|n)_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts", 2),
    (r"n_groups?|topk_group", 1),
    (r".*_rank", 16),
    (r"(.*_)?state_size|mamba_d_state|d_state", 8),
    (r"chunk_size_feed_forward", None),
    (r"(.*_)?chunk_size(_.*)?", 4),
    # images and sounds
    (r"image_seq_length|num_queries|num_query_tokens|.*num_latents|mm_tokens_per_image", 4),
    (r"num_codevectors_per_group|num_conv_pos_embeddings", 8),
    (r"num_conv_pos_embedding_groups", 2),
    (r"num_hash_buckets|expert_capacity", 64),
    (r"(.*_)?projection_size|coordinate_size|shape_size", 8),
    # widths
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim)", WIDTH),
    (r"(.*_)?(embedding_dim|embedding_size|projection_dim|hidden_size_per_layer_input)", WIDTH),
    (r"dim|project_dim|out_hidden_size|output_channels|projector_dim|text_dim|latent_channels", WIDTH),
    (r"output_dim|classifier_proj_size|lru_width|embed_proj_dim|conv_channels|reduce_dim", WIDTH),
    (r"(codevector|proj_codevector|xvector_output)_dim", WIDTH),
]


def shrunken(model_type: str, **fields: Any) -> Any:
    """The small configuration of an architecture."""
    return _shrunken(_class_of(model_type), fields)


def _class_of(model_type: str) -> Any:
    return type(transformers.AutoConfig.for_model(model_type))


def _shrunken(config_class: Any, fields: dict[str, Any]) -> Any:
    """The class with small sizes, and, one by one, those that are given."""
    default = config_class()
    taken = inspect.signature(config_class.__init__).parameters
    small = {name: found for name in taken if (found := _small(name, taken[name].default)) is not None}
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None and name in taken:
            given = fields.get(name, {})
            small[name] = _shrunken(_class_of(given["model_type"]) if "model_type" in given else type(part), given)
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = HEADS  # latent attention makes a key for each head
    small |= {name: value for name, value in fields.items() if name not in config_class.sub_configs}
    return config_class(**{**_tokens(default, taken), **small})


def _small(name: str, value: Any) -> Any:
    """What a field of this value becomes; `None` where it stays."""
    if isinstance(value, (list, tuple)):
        make = next((make for pattern, make in STAGES if re.fullmatch(pattern, name)), None)
        return make(value) if make and all(isinstance(each, int) for each in value) else None
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    return size if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _tokens(default: Any, taken: Any) -> dict[str, int]:
    """Ids of special tokens that a small vocabulary has, each its own."""
    names = [name for name in taken if re.fullmatch(r".*_token_(id|index)", name)]
    return {name: number for number, name in enumerate(names, 1) if isinstance(getattr(default, name, None), int)}
