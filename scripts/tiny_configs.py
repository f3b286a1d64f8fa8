"""A tiny model of every type of causal language model that transformers registers.

Its config has a small number for every size that the type and its nested configs have (NUMBERS), blocks of all kinds (LAYERS),
and what single types need beside that (NEEDED).
"""

import torch
from accelerate import init_empty_weights
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

BLOCKS = 4
VOCABULARY = 96
LARGEST = 20e6  # weights; if a model has more, NUMBERS lacks a key of its config
TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WRAPPERS = tuple(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in TYPES)

SMALL = {  # number -> the keys of configs that have it
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size encoder_hash_byte_group_vocab",
    32: "hidden_size d_model n_embd embedding_dim emb_dim word_embed_proj_dim lru_width input_embedding_size text_hidden_size "
    "output_embedding_size backbone_hidden_size embed_dim projection_dim out_hidden_size attention_hidden_size hidden_dim "
    "expert_ffn_hidden_size router_hidden_size depth_hidden_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff feed_forward_size "
    "intermediate_size_mlp dense_intermediate_size",
    BLOCKS: "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers num_decoder_layers num_attention_heads "
    "n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts index_n_heads linear_num_value_heads linear_num_heads "
    "mamba_n_heads mamba_num_heads mamba_d_conv",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
    "top_k_experts linear_num_key_heads depth encoder_layers num_encoder_layers encoder_attention_heads "
    "num_encoder_attention_heads num_codebooks hc_mult n_mamba_heads num_query_groups temporal_patch_size spatial_merge_size "
    "eos_token_id",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim swa_head_dim index_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim kv_channels mamba_head_dim mamba_headdim mamba_d_state state_size ssm_state_size "
    "mamba_dt_rank time_step_rank laurel_rank adapter_rank hidden_size_per_layer_input dim_head d_head attention_head_size "
    "rotary_dim d_rel sliding_window attention_chunk_size local_attention window_size attention_window_size sliding_window_size "
    "index_topk rel_extent chunk_size mamba_chunk_size patch_size o_lora_rank hc_lowrank gated_norm_rank",
    16: "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size image_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size num_positions mm_tokens_per_image",
    1: "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers n_groups mamba_n_groups mamba_ngroups "
    "n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num num_mem_blocks bos_token_id",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length",
    0: "pad_token_id num_nextn_predict_layers",
}
NUMBERS = {key: number for number, keys in SMALL.items() for key in keys.split()} | {"use_sliding_window": True}

LOCAL, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
# Type of a config -> kinds of its blocks, repeated until there are BLOCKS; for types whose first blocks are not of all kinds.
LAYERS = {
    **dict.fromkeys(("bailing_hybrid", "granitemoehybrid", "kimi_linear"), (LINEAR, FULL)),
    "gemma4_text": (LOCAL, FULL),
    **dict.fromkeys(("dots1", "gemma3_text", "gemma3n_text", "kolibri1", "laguna", "mellum", "ministral"), (LOCAL, FULL)),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "smollm3"), (LOCAL, FULL)),
    "deepseek_v4": ("heavily_compressed_attention", LOCAL, "compressed_sparse_attention", LOCAL),
    "inkling2_text": ("hybrid_sliding", "hybrid"),
    "inkling_text": ("hybrid_sliding", "hybrid"),
    "lfm2": ("conv", FULL),
    "lfm2_moe": ("conv", FULL),
    "lfm3": ("conv", FULL, LOCAL, "conv"),
    "minimax_m3_vl_text": ("minimax_m3_sparse", FULL),
    "zaya": ("hybrid", "hybrid_sliding"),
    "zamba": (LINEAR, "hybrid"),
    "zamba2": (LINEAR, "hybrid"),
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
ROTARY_3D = (  # types whose rotary embeddings have a section each for time, height and width
    "cosmos3_edge_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text",
)  # fmt: skip
NEEDED: dict[str, dict] = {  # type of a config -> {key: value}
    **{kind: {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}} for kind in ROTARY_3D},
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "bamba": {"attn_layer_indices": [1, 3]},
    **{kind: {"vocabulary_map": {"<image>": 3}} for kind in ("chameleon", "emu3")},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16]},
    "hunyuan_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}},
    "glm5_next_text": {"index_kpool": 4},
    "chameleon_vqgan": {"base_channels": 32, "num_embeddings": 96},
    "emu3_vqgan": {"base_channels": 32, "codebook_size": 96},
    "janus_vqgan": {"base_channels": 32, "num_embeddings": 96, "latent_channels": 32},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2", "vision_config": {"hidden_size": 64}},
    "blt": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "cohere_compass_text": {
        "layer_types": [LOCAL, FULL] * 2,
        "rope_parameters": {FULL: None, LOCAL: {**ROPE, "mrope_section": [2, 1, 1]}},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, -1, 4, 4], "adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 16},
    "dots3_note_text": {"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 8, "swa_qk_nope_head_dim": 8},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 1},
    "gemma3n_vision": {"architecture": "test_convnext"},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "mellum": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 16], "axial_pos_embds_dim": [16, 16], "num_buckets": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "num_key_value_heads": 4},
    "zamba2": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(kind: str, **changes) -> PretrainedConfig:
    """The config of a type with `changes` to it; those to a nested config are a dict."""
    return CONFIG_MAPPING[kind](**_tiny(CONFIG_MAPPING[kind], changes))


def spread(model: torch.nn.Module, noise: float) -> None:
    """Make matrices random, with larger values than a new model's, and add noise to biases and to the weights of norms."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data += noise * torch.randn_like(parameter)


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A random model of a type, the same at every call.

    Raises:
        ValueError: the model would have more than LARGEST weights.
    """
    config = tiny_config(kind, **changes)
    wrapped = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM  # as checkpoints on the hub are loaded
    with init_empty_weights():
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the config of {kind} is not tiny, {size / 1e6:.0f} million weights")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = auto.from_config(config, dtype=dtype)
        spread(model, noise=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # the experts that a token is sent to; in a new model, always the first
                buffer.random_(BLOCKS)
    return model.eval()


def _tiny(cls: type[PretrainedConfig], changes: dict) -> dict:
    """The keys and values that make a config of a class tiny, its nested configs included."""
    keys = cls.__dataclass_fields__
    values = {key: number for key, number in NUMBERS.items() if key in keys}
    if "qk_rope_head_dim" in keys:  # latent attention: no two heads share keys
        values["num_key_value_heads"] = values["num_attention_heads"]
    if kinds := LAYERS.get(cls.model_type):
        values[cls.attribute_map.get("layer_types", "layer_types")] = list(kinds) * (BLOCKS // len(kinds))
    values |= NEEDED.get(cls.model_type, {})
    for key in keys & cls.sub_configs.keys():
        nested = _nested_class(cls, key, values)
        if nested is not None:
            values[key] = _tiny(nested, values.get(key, {})) | {"model_type": nested.model_type}
    for key, change in changes.items():
        values[key] = values.get(key, {}) | change if isinstance(change, dict) else change
    return values


def _nested_class(cls: type[PretrainedConfig], key: str, values: dict) -> type[PretrainedConfig] | None:
    """The class of the nested config under a key; None if the default is to have none."""
    model_type = values.get(key, {}).get("model_type")
    if model_type:
        return CONFIG_MAPPING[model_type]
    if cls.sub_configs[key].__name__ != "AutoConfig":
        return cls.sub_configs[key]
    default = getattr(cls(), key)
    return None if default is None else type(default)
