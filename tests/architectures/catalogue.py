"""The architectures that are looked at, by family, and what of each its sizes and signature do not tell.

module = built(FAMILIES[0], "llama")
"""

from typing import Any, NamedTuple

import torch
import transformers

from .shrinking import shrunken


class Family(NamedTuple):
    """Architectures that are loaded by one automatic class."""

    name: str
    loaded_by: str
    architectures: str


FAMILIES = [
    Family(
        "decoder",
        "AutoModelForCausalLM",
        """apertus arcee bart bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom
        camembert codegen cohere cohere2 cpmant ctrl cwm data2vec-text diffllama doge electra ernie ernie4_5
        exaone exaone4 falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox
        gpt_neox_japanese gptj granite helium hunyuan_v1_dense internlm3 llama marian mbart megatron-bert
        ministral ministral3 mistral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 openai-gpt opt
        pegasus persimmon phi phi3 plbart qwen2 qwen3 reformer rembert roberta roberta-prelayernorm roc_bert
        roformer seed_oss smollm3 stablelm starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta
        xlm-roberta-xl xlnet xmod""",
    ),
    Family(
        "mixture of experts",
        "AutoModelForCausalLM",
        """afmoe aria_text dbrx deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe gpt_oss granitemoe
        granitemoeshared hunyuan_v1_moe jetmoe llama4_text longcat_flash minimax minimax_m2 mixtral olmoe phimoe
        qwen2_moe qwen3_moe solar_open deepseek_v4""",
    ),
    Family(
        "state space and hybrid",
        "AutoModelForCausalLM",
        """bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 nemotron_h
        olmo_hybrid qwen3_5_text qwen3_next recurrent_gemma rwkv zamba2""",
    ),
    Family(
        "encoder",
        "AutoModelForMaskedLM",
        """albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm eurobert
        flaubert fnet funnel ibert layoutlm longformer luke megatron-bert mobilebert modernbert mpnet mra
        nystromformer perceiver rembert roberta roberta-prelayernorm roc_bert roformer squeezebert tapas xlm
        xlm-roberta xlm-roberta-xl xmod yoso""",
    ),
    Family(
        "encoder and decoder",
        "AutoModelForSeq2SeqLM",
        """bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian mbart mt5 mvp
        nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma umt5""",
    ),
    Family(
        "vision",
        "AutoModelForImageClassification",
        """beit bit convnext convnextv2 cvt data2vec-vision dinov2 dinov2_with_registers donut-swin efficientnet focalnet
        hiera ijepa imagegpt mobilenet_v1 mobilenet_v2 mobilevit poolformer pvt pvt_v2 regnet resnet segformer
        swiftformer swin swinv2 vit vit_msn""",
    ),
    Family("vision", "DeiTForImageClassification", "deit"),
    Family("vision", "LevitForImageClassification", "levit"),
    Family("vision", "AutoModel", "dinov3_convnext dinov3_vit dpt groupvit hgnet_v2 sam swin2sr vit_mae vitdet"),
    Family("vision", "AutoModelForDepthEstimation", "depth_anything dpt glpn"),
    Family("vision", "AutoModelForObjectDetection", "conditional_detr deformable_detr detr rf_detr yolos"),
    Family("video", "AutoModelForVideoClassification", "timesformer videomae vivit"),
    Family(
        "speech",
        "AutoModelForCTC",
        "data2vec-audio hubert parakeet_ctc sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm",
    ),
    Family("speech", "AutoModelForSpeechSeq2Seq", "moonshine speech_to_text speecht5 whisper seamless_m4t"),
    Family("speech", "AutoModelForAudioClassification", "audio-spectrogram-transformer"),
    Family("speech", "AutoModel", "dac encodec mimi"),
    Family(
        "vision and language",
        "AutoModelForImageTextToText",
        """aya_vision blip blip-2 cohere2_vision florence2 fuyu gemma3 git glm4v got_ocr2 idefics idefics2 idefics3
        instructblip internvl kosmos-2.5 lfm2_vl llava llava_next llava_next_video llava_onevision mistral3
        mllama ovis2 paligemma pix2struct qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe smolvlm udop video_llava
        vipllava vision-encoder-decoder""",
    ),
    Family(
        "images and text",
        "AutoModel",
        """align altclip blip bridgetower chinese_clip clip clipseg flava lxmert metaclip_2 owlv2 owlvit siglip siglip2
        vilt vision-text-dual-encoder visual_bert xclip""",
    ),
    Family("layout", "AutoModel", "bros layoutlm layoutlmv3 lilt markuplm"),
    Family("retrieval", "ColPaliForRetrieval", "colpali"),
    Family("retrieval", "ColQwen2ForRetrieval", "colqwen2"),
    Family("retrieval", "AutoModel", "dpr"),
    Family("retrieval", "DPRReader", "dpr"),
    Family("time series", "AutoModel", "informer patchtsmixer patchtst time_series_transformer decision_transformer"),
]

# The fields that the shrinker does not know, or whose sizes depend on each other.
HYBRID = ["linear_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {**ROPE, "mrope_section": [1, 1, 2]}
PYRAMID = {"num_attention_heads": [1, 2, 3, 4], "image_size": 64}
RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4}
DETR = {"backbone_config": RESNET}
BACKBONE = {
    "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4, "out_indices": [1, 2, 3, 4], "apply_layernorm": True, "reshape_hidden_states": False,
}  # fmt: skip
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}
QWEN = {"text_config": {"rope_parameters": SECTIONS}, "vision_config": {"hidden_size": 32, "embed_dim": 32}}
SWIN = {"embed_dim": 16, "num_heads": [1, 2, 4, 8], "window_size": 2, "image_size": 64}
FIELDS: dict[str, dict[str, Any]] = {
    "align": {
        "vision_config": {"image_size": 64, "hidden_dim": 640, "width_coefficient": 0.5, "depth_coefficient": 0.1},
        "projection_dim": 160,
    },
    "audio-spectrogram-transformer": {"max_length": 32},
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "bit": {"num_groups": 4, "embedding_size": 16},
    "blip-2": {"image_token_index": 9},
    "bridgetower": {
        "text_config": {"num_hidden_layers": 2},
        "vision_config": {"num_hidden_layers": 2, "hidden_size": 64},
        "num_attention_heads": 4,
    },
    "bros": {"hidden_size": 64},
    "colpali": {"vlm_config": {"model_type": "paligemma"}},
    "colqwen2": {"vlm_config": {"model_type": "qwen2_vl", **QWEN}},
    "conditional_detr": DETR,
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    "cvt": {"depth": [1, 2, 3], "num_heads": [1, 2, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deformable_detr": DETR,
    "depth_anything": {"backbone_config": BACKBONE, "patch_size": 4},
    "detr": DETR,
    "dinov3_convnext": {"image_size": 64},
    "donut-swin": SWIN,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "image_size": 64, "patch_size": 16},
    "efficientnet": {"image_size": 64, "hidden_dim": 2560, "depth_coefficient": 0.1},
    "esm": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "glm4v": {"text_config": {"rope_parameters": SECTIONS}},
    "glpn": PYRAMID,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_d_head": 16},
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 16, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 16, 16],
        "hidden_sizes": [16, 16, 16, 16],
    },
    "hunyuan_v1_dense": {"head_dim": 8, "rope_parameters": ROPE},
    "hunyuan_v1_moe": {"head_dim": 8, "rope_parameters": ROPE, "num_experts": 4, "moe_topk": 2},
    "idefics": {"vision_config": {"hidden_size": 32}},
    "informer": SERIES,
    "instructblip": {"image_token_index": 9},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 16},
    "levit": {"image_size": 64, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "llava_next": {"image_grid_pinpoints": [[16, 16]], "vision_config": {"hidden_size": 32}},
    "llava_next_video": {"image_grid_pinpoints": [[16, 16]]},
    "llava_onevision": {"image_grid_pinpoints": [[16, 16]]},
    "luke": {"entity_vocab_size": 20},
    "lxmert": {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16},
    "mamba2": {"head_dim": 16},
    "mimi": {"upsample_groups": 4, "num_filters": 4},
    "ministral": {"head_dim": 8, "rope_parameters": ROPE},
    "mllama": {
        "text_config": {"num_hidden_layers": 2, "cross_attention_layers": [1]},
        "vision_config": {"num_global_layers": 1, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96},
    },
    "nemotron": {"num_key_value_heads": 2},
    "patchtst": {"context_length": 32, "patch_length": 8, "patch_stride": 8},
    "perceiver": {
        "num_latents": 4,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
    },
    "pvt": PYRAMID,
    "pvt_v2": PYRAMID,
    "qwen2_5_vl": {"text_config": {"rope_parameters": SECTIONS}, "vision_config": {"fullatt_block_indexes": [1]}},
    "qwen2_vl": QWEN,
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "num_buckets": 2,
        "chunk_size_lm_head": 0,
        "attention_head_size": 8,
    },
    "sam": {
        "vision_config": {"global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 16},
        "mask_decoder_config": {"iou_head_hidden_dim": 32},
    },
    "seamless_m4t": {"feature_projection_input_dim": 16},
    "siglip": {"text_config": {"projection_size": 32}},
    "swin": SWIN,
    "swin2sr": {"image_size": 16, "patch_size": 1, "num_heads": [2] * 6, "window_size": 4},
    "swinv2": SWIN,
    "time_series_transformer": SERIES,
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "wav2vec2-bert": {"vocab_size": 99, "feature_projection_input_dim": 16},
    "wav2vec2-conformer": {"vocab_size": 99},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "yolos": {"image_size": [16, 16], "num_detection_tokens": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}


def built(family: Family, architecture: str) -> torch.nn.Module:
    """The small model, with random weights."""
    config = shrunken(architecture, **FIELDS.get(architecture, {}))
    loaded_by = getattr(transformers, family.loaded_by)
    torch.manual_seed(0)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    make = getattr(loaded_by, "from_config", None) or loaded_by._from_config
    return make(config).eval()
