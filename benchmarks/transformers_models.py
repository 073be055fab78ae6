"""Builds a small model, with example inputs, of any type that transformers lists.

    from benchmarks.transformers_models import TYPES, build
    model, inputs = build("llama")[:2]

`TYPES` holds the types of transformers' own list `MODEL_MAPPING_NAMES`. All weights are random. Nothing is downloaded.

How a model is built:

1. The config of the type is created with its defaults. Its fields and the fields of nested configs are then replaced
   by small numbers, by their names: 32 for hidden sizes, 2 for layers, 4 for heads. If layers have different kinds,
   such as sliding and full attention, there is one layer of each kind.
2. Several policies are tried in turn, from "all fields are small" to "only a few fields are small". A policy that gives
   more than LARGEST parameters is skipped.
3. The inputs follow from the names of the arguments of the forward. Several sets are tried. The first set with which
   the forward returns finite numbers is used. The batch has two samples.
4. SPECIAL holds what the names of the fields do not tell, for single types.

If no policy works, `NotBuilt` gives the reason.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

TOKENS = 96
LENGTH = 12
BATCH = 2
LARGEST = 2_000_000
# Ids of placeholder tokens. Random ids of text are below all of them.
FIRST_PLACEHOLDER = 70


class NotBuilt(Exception):
    """No policy gives a model that runs. The message is the reason."""


class Built(NamedTuple):
    """A model with inputs.

    Args:
        model: The model in eval mode.
        inputs: The arguments of its forward.
        policy: The policy that worked.
    """

    model: nn.Module
    inputs: dict[str, Any]
    policy: str


# Pattern of a field's name -> its small value. The first pattern that matches counts.
NUMBERS: list[tuple[str, Any]] = [
    (r"(chunk_size_feed_forward|pretraining_tp|.*_coefficient|.*_cost|.*loss.*|.*_dropout.*|.*_prob.*)", None),
    (
        r"(vocab_size|.*_vocab_size|n_words|text_vocab_size|encoder_vocab_size"
        r"|vocab_size_per_layer_input|num_bpe_labels|num_wordpiece_labels|num_character_labels|encoder_hash_byte_group_vocab)",
        TOKENS,
    ),
    (r"type_vocab_size", None),
    (r"(num_key_value_heads|.*_num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|kv_n_heads)", "kv"),
    (
        r"(num_attention_heads|.*_num_attention_heads|num_heads|n_heads?|.*_attention_heads|attention_heads|num_.*_attn_heads"
        r"|.*_num_heads|nhead|.*_n_heads?|resampler_heads|n_head)",
        4,
    ),
    (r"(qk_head_dim|.*_qk_head_dim)", None),
    (r"(.*qk_rope_head_dim|rotary_dim)", 4),
    (r"(codebook_size|num_embeddings|.*_codebook_size)", 64),
    (r"(n_groups|mamba_n_groups|mamba_ngroups|n_hash.*)", 1),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)", 16),
    (r"(head_dim|.*_head_dim|d_kv|attention_head_dim|dim_head|.*_dim_head|kv_channels|attention_head_size|d_head)", 8),
    (r"(kv_lora_rank|q_lora_rank|o_lora_rank|.*_lora_rank)", 16),
    (
        r"(moe_intermediate_size|.*intermediate_size|.*_ffn_dim|ffn_dim|ffn_hidden_size|.*ffn_hidden_size|d_ff|d_inner|n_inner"
        r"|mlp_dim|mlp_hidden_size|ffn_size|feed_forward_size|intermediate_dim|dim_feedforward|.*_intermediate_dim"
        r"|feedforward_dim|.*linear_units|hidden_dim_ff|intermediate_size_mlp|dim_ff|.*feed_?forward.*(dim|size))",
        48,
    ),
    (
        r"(num_experts_per_tok|num_experts_per_token|moe_topk|top_k_experts|moe_k|num_selected_experts|moe_top_k|top_k)",
        2,
    ),
    (r"(n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts|.*_num_experts)", 4),
    (
        r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_nextn_predict_layers|num_mtp_layers"
        r"|num_kv_shared_layers|n_dense_layers)",
        "small",
    ),
    (
        r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|.*num_hidden_layers|.*num_layers|depth"
        r"|num_encoder_layers|num_decoder_layers|.*_depth|.*_layers|num_blocks|num_encoder_blocks|n_blocks)",
        "layers",
    ),
    (
        r"(max_position_embeddings|n_positions|n_ctx|.*max_position_embeddings|max_seq_len|seq_length|max_seq_length"
        r"|max_sequence_length|max_target_positions|model_max_length|original_max_position_embeddings"
        r"|max_2d_position_embeddings)",
        "positions",
    ),
    (r"(image_size|.*_image_size|img_size|resolution)", "image"),
    (r"(patch_size|vision_patch_size|.*_patch_size)", "patch"),
    (r"(sliding_window.*|attention_window|window|local_attention|attention_window_size)", "window"),
    (r"(num_queries|num_query_tokens|num_latents|resampler_n_latents|num_proposals|query_length)", 6),
    (r"(num_denoising)", 0),
    (r"(max_source_positions)", "source"),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|dim|hidden_dim|embedding_size|.*_hidden_size|.*_hidden_dim|projection_dim"
        r"|out_hidden_size|output_hidden_size|.*_projection_dim|hidden_channels|n_embed|emb_dim|.*_embed_dim|model_dim"
        r"|width|d_latents|embedding_dim|proj_dim|decoder_hidden_size|output_dim|hidden_size_per_layer_input|lm_hidden_size"
        r"|word_embed_proj_dim|encoder_dim|latent_dim|d_embed|.*_proj_dim|input_dim|dec_d_model|enc_d_model"
        r"|feature_size|mask_feature_size|fpn_feature_size|descriptor_dim|mask_dim|output_channels|intra_bottleneck_size"
        r"|condition_dim|projector_input_dim|.*_output_dim|adapter_in_dim|adapter_out_dim|visual_feat_dim|visual_embedding_dim)",
        32,
    ),
    (r"(index_topk)", 4),
    (r"(context_size|num_pos_feats|n_window)", 16),
    (r"(mamba_n_heads|mamba_num_heads|linear_num_(key|value)_heads)", 4),
    (
        r"(mamba_d_state|mamba_chunk_size|chunk_size|state_size|ssm_state_size|linear_key_head_dim"
        r"|linear_value_head_dim)",
        8,
    ),
    (r"(num_conv_pos_embedding_groups)", 4),
    (r"(num_conv_pos_embeddings)", 8),
    (r"(upsample_groups|codebook_dim|vector_quantization_hidden_dimension)", 32),
    (r"(codevector_dim|proj_codevector_dim|xvector_output_dim|classifier_proj_size)", 16),
    (r"(num_codevectors_per_group)", 8),
    (r"(num_parallel_samples)", 2),
    (r"(bos_token_id|decoder_start_token_id)", 1),
    (r"(.*adapter_input_size|base_channels|ch|bottleneck_features)", 32),
    (r"(fusion_hidden_size|neck_out_channels|stem_channels|num_filters|.*predictor_channels|postnet_units)", 16),
]
_NUMBERS = [(re.compile(pattern), value) for pattern, value in NUMBERS]
# Field -> its value with the policy that fills fields.
FILLED = {
    "num_experts_per_tok": 2,
    "topk_group": 1,
    "n_group": 1,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
    "vocab_size": TOKENS,
}
CONV_STEM = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
"""The convolutions before the speech encoders of the family of wav2vec 2.0."""


class Policy(NamedTuple):
    """How fields are made small.

    Args:
        name: Name of the policy.
        sizes: False leaves hidden sizes, heads and lists of them as they are.
        layers: False leaves the number of layers as it is.
        image: Height and width of images, or 0 to leave them as they are.
        patch: Size of patches, or 0 to leave it as it is.
        lists: False leaves lists of sizes and depths as they are.
        head_dim: The size of a head, where a field gives it.
        kinds: False lets the config choose the kinds of the layers, and does not take one layer of each kind.
        fill: True gives a number to some fields that are None by default.
        sections: True adds the sections of a multimodal rope to the rope parameters.
    """

    name: str
    sizes: bool = True
    layers: bool = True
    image: int = 32
    patch: int = 8
    lists: bool = True
    head_dim: int = 8
    kinds: bool = True
    fill: bool = False
    sections: bool = False


POLICIES = [
    Policy("small"),
    Policy("small, larger image", image=64),
    Policy("small, own patches", image=64, patch=0),
    Policy("small, own lists", lists=False, image=64, patch=0),
    Policy("small, kinds of layers by default", kinds=False),
    Policy("small, large heads", head_dim=16),
    Policy("small, fields filled", fill=True),
    Policy("small, sections of rope", sections=True),
    Policy("small, large heads, sections of rope", sections=True, head_dim=16),
    Policy("small, fields filled, sections of rope", sections=True, fill=True),
    Policy("small, own image", image=0, patch=0),
    Policy("small, own layers", layers=False),
    Policy("own sizes", sizes=False, image=64, patch=0, lists=False),
    Policy("own sizes and lists", sizes=False, image=0, patch=0, lists=False),
]

# Type -> what the names of the fields do not tell: "config": fields; "inputs": names of inputs, or a function of the
# model; "class": the name of the class. A field with a dot is a field of a nested config.
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2}
_ROPE_BY_KIND = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
_HGNET = {
    "hidden_sizes": [16, 64, 128, 256],
    "stem_channels": (3, 4, 6),
    "stage_in_channels": (6, 16, 64, 128),
    "stage_mid_channels": (6, 12, 24, 48),
    "stage_out_channels": (16, 64, 128, 256),
    "stage_num_blocks": (1, 1, 1, 1),
    "stage_numb_of_layers": (2, 2, 2, 2),
}
SPECIAL: dict[str, dict[str, Any]] = {
    "autoformer": {"config": {**_SERIES, "label_length": 4, "moving_average": 3, "feature_size": 6}},
    "informer": {"config": _SERIES},
    "bros": {"config": {"hidden_size": 64}},
    "lilt": {"config": {"hidden_size": 48}},
    "bamba": {"config": {"attn_layer_indices": [1]}},
    "blip-2": {"config": {"image_token_index": FIRST_PLACEHOLDER}},
    "bridgetower": {
        "config": {
            "hidden_size": 128,
            "num_attention_heads": 2,
            "vision_config.hidden_size": 128,
            "text_config.hidden_size": 128,
            "text_config.num_attention_heads": 2,
            "text_config.intermediate_size": 96,
        }
    },
    "chameleon": {"config": {"vocabulary_map": {"<image>": FIRST_PLACEHOLDER}}},
    "clap": {
        "config": {
            "audio_config.hidden_size": 256,
            "audio_config.patch_embeds_hidden_size": 32,
            "audio_config.depths": [1, 1, 1, 1],
            "audio_config.num_attention_heads": [2, 4, 8, 16],
        },
        "inputs": lambda m: {"input_ids": ids(), "attention_mask": mask(), "input_features": _random(2, 1, 256, 64)},
    },
    "clvp": {
        "config": {
            "text_config.hidden_size": 128,
            "speech_config.hidden_size": 128,
            "decoder_config.hidden_size": 128,
            "text_config.projection_dim": 128,
            "speech_config.projection_dim": 128,
            "decoder_config.num_mel_attn_blocks": 2,
        }
    },
    "cvt": {"config": {"depth": [1, 2, 3]}},
    "cohere_compass": {"config": {"text_config.rope_parameters": _ROPE_BY_KIND}},
    "cohere_compass_text": {"config": {"rope_parameters": _ROPE_BY_KIND}},
    **{
        name: {"config": {"encoder_in_channels": [64, 128, 256]}}
        for name in ("d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4")
    },
    "deepseek_ocr2": {"config": {"text_config.mlp_layer_types": ["dense", "sparse"]}},
    "efficientloftr": {
        "config": {"out_features": [16, 16, 24, 32], "stage_num_blocks": [1, 1, 1, 1], "hidden_size": 32}
    },
    "ernie4_5_vl_moe": {
        "config": {
            "text_config.hidden_size": 256,
            "text_config.num_attention_heads": 2,
            "text_config.num_key_value_heads": 1,
            "text_config.intermediate_size": 96,
            "text_config.moe_intermediate_size": [48, 16],
        }
    },
    "fastspeech2_conformer": {"largest": 4_000_000},
    "fun_asr_nano": {"config": {"adaptor_config.intermediate_size": 8}},
    "fun_asr_nano_encoder": {
        "inputs": lambda m: {"input_features": _random(2, 16, 560), "input_features_mask": torch.ones(2, 16).long()}
    },
    "gemma3n_text": {"config": {"num_kv_shared_layers": 0, "intermediate_size": 48}},
    "gemma3n_audio": {
        "inputs": lambda m: {"audio_mel": _random(2, 64, 128), "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool)}
    },
    "glm5_next": {"config": {"text_config.index_topk": 16}},
    "glm5_next_text": {"config": {"index_topk": 16}},
    "granite_speech5_ctc": {"inputs": lambda m: {"input_features": _random(2, 16, 320)}},
    "granite_speech5_encoder": {"inputs": lambda m: {"input_features": _random(2, 16, 320)}},
    "granitemoehybrid": {"config": {"layer_types": ["mamba", "attention"]}},
    "instructblip": {"config": {"image_token_index": FIRST_PLACEHOLDER}},
    "instructblipvideo": {"config": {"video_token_index": FIRST_PLACEHOLDER + 1}},
    "jamba": {
        "config": {
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        }
    },
    "janus": {"largest": 6_000_000},
    "kosmos-2": {
        "config": {"latent_query_num": 4},
        "inputs": lambda m: {
            "input_ids": ids(),
            "attention_mask": torch.ones(2, LENGTH).long(),
            "pixel_values": image(m.config),
            "image_embeds_position_mask": (torch.arange(LENGTH) < 4).long().expand(2, LENGTH),
        },
    },
    "muse_spark_audio": {"inputs": lambda m: {"input_values": _random(2, 3840)}},
    "musicgen": {"from": "musicgen_decoder", "class": "MusicgenForCausalLM"},
    "musicgen_melody": {"from": "musicgen_melody_decoder", "class": "MusicgenMelodyForCausalLM"},
    "phi4_multimodal": {"largest": 4_000_000},
    "qwen4_exp_text": {"config": {"token_budget": 8, "compress_ratio": 4}},
    "seggpt": {"config": {"num_hidden_layers": 4, "merge_index": 0, "intermediate_hidden_state_indices": [1, 2, 3]}},
    "siglip2": {
        "inputs": lambda m: {
            "input_ids": ids(),
            "pixel_values": _random(2, 16, 3 * 64),
            "pixel_attention_mask": torch.ones(2, 16).long(),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
    },
    "time_series_transformer": {"config": _SERIES},
    "timesfm": {
        "config": {"context_length": 64, "horizon_length": 8},
        "inputs": lambda m: {
            "past_values": _random(2, 64),
            "past_values_padding": torch.zeros(2, 64).long(),
            "freq": torch.zeros(2, 1).long(),
        },
    },
    "udop": {
        "inputs": lambda m: {
            "input_ids": ids(),
            "attention_mask": mask(),
            "bbox": _boxes().float() / 100,
            "decoder_input_ids": ids(8, seed=1),
        }
    },
    "video_llama_3_vision": {
        "inputs": lambda m: {
            "pixel_values": packed(m.config)[0],
            "grid_thw": packed(m.config)[1],
            "merge_sizes": torch.tensor([2, 2]),
        }
    },
    "vits": {"largest": 4_000_000},
    "xmod": {"config": {"languages": ["en_XX"], "default_language": "en_XX"}},
    "zamba": {"config": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}},
    "zamba2": {"config": {"attention_hidden_size": 64, "attention_head_dim": 16}},
    "levit": {"config": {"image_size": 128, "patch_size": 16, "key_dim": [4, 4, 4]}},
    "lfm2_moe": {"config": {"layer_types": ["conv", "full_attention"]}},
    "longcat_flash": {"config": {"head_dim": 4}},
    "moonshine": {
        "config": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
        "inputs": lambda m: {"input_values": _random(2, 4096), "decoder_input_ids": ids(8, seed=1)},
    },
    "dbrx": {"config": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}},
    "esm": {"config": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}},
}
# Type -> why it is not built.
NOT_BUILT: dict[str, str] = {
    "timm_backbone": "its architecture is a name of timm, not a config",
    "timm_wrapper": "its architecture is a name of timm, not a config",
    "gemma3n_vision": "its architecture is a name of timm, not a config",
    "vision-text-dual-encoder": "it has no default config: it joins two models of the caller",
    "bark": "its base class has no forward",
    **dict.fromkeys(
        (
            "gemma3n",
            "fast_vlm",
            "edgetam",
            "edgetam_vision_model",
            "pe_audio_video",
            "pe_audio_video_encoder",
            "pe_video",
            "pe_video_encoder",
            "perception_lm",
        ),
        "a part of it is a model of timm that its config cannot make small",
    ),
    **dict.fromkeys(
        ("edgetam_video", "sam2_video", "sam3_video", "sam3_tracker_video"), "its forward needs the session of a video"
    ),
    **dict.fromkeys(
        (
            "bit",
            "dac",
            "efficientnet",
            "encodec",
            "hgnet_v2",
            "mobilenet_v1",
            "mobilenet_v2",
            "textnet",
            "univnet",
            "uvdoc",
            "vibevoice_acoustic_tokenizer",
            "vibevoice_acoustic_tokenizer_decoder",
            "vibevoice_acoustic_tokenizer_encoder",
            "pp_ocrv6_medium_det",
            "pp_ocrv6_small_det",
            "xlstm",
            "mamba2",
        ),
        "it has no attention, and its default sizes do not run when they are made small",
    ),
}


def _types() -> dict[str, str]:
    """Returns type -> name of its base class."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return {name: first if isinstance(first, str) else first[0] for name, first in MODEL_MAPPING_NAMES.items()}


TYPES = _types()


def classes(name: str, config: Any) -> list[str]:
    """Returns the names of the classes to try for a type, the best first.

    Encoder-decoders and decoders of text get the class that can generate. Others get the base class.
    """
    from transformers.models.auto import modeling_auto as auto

    if "class" in SPECIAL.get(name, {}):
        return [SPECIAL[name]["class"]]
    found = []
    if getattr(config, "is_encoder_decoder", False):
        for table in (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES):
            found += [table[name]] if name in table else []
    elif name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        found.append(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    found.append(TYPES[name])
    return [each if isinstance(each, str) else each[0] for each in dict.fromkeys(found)]


def _fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _power(values: list[int], least: int = 8) -> list[int]:
    """Divides all sizes by the largest power of two that leaves multiples of `least`."""
    while all(v % (2 * least) == 0 for v in values):
        values = [v // 2 for v in values]
    return values


def small_fields(config: Any, policy: Policy) -> dict[str, Any]:
    """Returns the fields of a config, without nested configs, that the policy changes."""
    own, out = _fields(config), {}
    heads = next((own[n] for n in ("num_attention_heads", "num_heads", "n_head", "n_heads") if n in own), None)
    count = next(
        (own[n] for n in ("num_hidden_layers", "n_layers", "n_layer", "num_layers") if isinstance(own.get(n), int)), 0
    )
    stages = any(
        isinstance(v, (list, tuple))
        and len(v) == count
        and re.fullmatch(r"depths|.*hidden_sizes|num_heads|patch_sizes", n)
        for n, v in own.items()
    )
    chosen = _layers_of_each_kind(own, count) if policy.layers else []
    for field, value in own.items():
        if "token_id" in field or "token_index" in field:
            new = _token(field, value)
        elif isinstance(value, (list, tuple)):
            new = _list(field, value, policy, count, chosen)
        elif isinstance(value, dict):
            new = _rope(value, policy.head_dim)
        elif isinstance(value, int) and not isinstance(value, bool):
            new = _number(field, value, policy, heads, count if stages else len(chosen) or 2)
        else:
            continue
        if new is not None and new != value:
            out[field] = new
    # Hierarchical models have a list of heads, one number for each stage, and one hidden size that doubles.
    per_stage = own.get("num_heads") or own.get("num_attention_heads")
    if policy.sizes and isinstance(per_stage, (list, tuple)) and isinstance(own.get("embed_dim"), int):
        out["embed_dim"] = 16
        for field in ("num_heads", "num_attention_heads"):
            if isinstance(own.get(field), (list, tuple)):
                out[field] = type(per_stage)(2 ** (i + 1) for i in range(len(per_stage)))
        if isinstance(own.get("patch_size"), int):
            out["patch_size"] = min(own["patch_size"], 4)
        if isinstance(own.get("window_size"), int):
            out["window_size"] = 4
    # These are computed from the layers, unless they are given.
    if not policy.kinds:
        out = {k: v for k, v in out.items() if not (isinstance(v, list) and v and isinstance(v[0], str))}
    if policy.fill:
        filled = {**FILLED, "head_dim": policy.head_dim}
        out |= {field: new for field, new in filled.items() if field in own and own[field] is None}
    rope = out.get("rope_parameters", own.get("rope_parameters")) or {}
    if policy.sections and "rope_parameters" in own and not any(isinstance(v, dict) for v in rope.values()):
        half = int(policy.head_dim * rope.get("partial_rotary_factor", 1)) // 2
        out["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            **rope,
            "mrope_section": _sections(half),
        }
    # The inner size of a state space layer is the number of its heads times their size.
    if policy.sizes and {"expand", "head_dim", "state_size"} <= set(own):
        out["head_dim"] = 16
    if "conv_dim" in own and "conv_stride" in own and policy.sizes:
        out |= {k: v for k, v in CONV_STEM.items() if k in own}
    return out


def _layers_of_each_kind(own: Mapping[str, Any], count: int) -> list[int]:
    """Returns the indices of layers to keep: the first layer of each kind, and at least two."""
    lists = [v for v in own.values() if isinstance(v, (list, tuple)) and len(v) == count and count > 2]
    # Other lists of numbers are sizes of stages.
    lists = [v for v in lists if all(isinstance(each, (str, bool)) or each in (0, 1) for each in v)]
    if not lists:
        return []
    kinds = list(zip(*lists, strict=True))
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:4]
    return sorted(first if len(first) > 1 else [0, 1])


def _token(field: str, value: Any) -> Any:
    """Returns a small id for a special token. Placeholders of images and sounds get ids that no text has."""
    if isinstance(value, (list, tuple)):
        return [_token(field, each) for each in value][:1] if value and isinstance(value[0], int) else None
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    for place, name in enumerate(("pad", "bos", "eos", "decoder_start", "sep", "cls")):
        if field.startswith(f"{name}_token"):
            return value if 0 <= value < 4 or value < 0 else min(place, 3)
    if value < FIRST_PLACEHOLDER:
        return value
    known = [
        "image_token",
        "video_token",
        "audio_token",
        "speech_token",
        "boi",
        "eoi",
        "vision_start",
        "vision_end",
        "image_start",
        "image_end",
        "video_start",
        "video_end",
        "audio_bos",
        "audio_eos",
        "mask",
        "boa",
        "eoa",
    ]
    for place, name in enumerate(known):
        if name in field:
            return FIRST_PLACEHOLDER + place
    return FIRST_PLACEHOLDER + len(known) + sum(map(ord, field)) % 8


def _list(field: str, value: Any, policy: Policy, count: int, chosen: list[int]) -> Any:
    """Returns a small value for a list or tuple, or None to leave it."""
    if not value:
        return None
    if chosen and len(value) == count and isinstance(value[0], (str, bool, int)) and not isinstance(value[0], Tensor):
        return [value[i] for i in chosen]
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    if not whole or not policy.lists:
        return None
    if re.fullmatch(r"(depths|num_layers|layers|stage_num_blocks|num_blocks|blocks_per_stage|.*_depths|depth)", field):
        return [min(each, 2) if i == 0 else 1 for i, each in enumerate(value)]
    if re.fullmatch(
        r"(hidden_sizes|embed_dims?|dims|embed_dim_per_stage|encoder_hidden_sizes|encoder_embed_dims|.*_hidden_sizes"
        r"|neck_hidden_sizes|backbone_channel_list)",
        field,
    ):
        return _power(list(value)) if policy.sizes else None
    if field == "decoder_in_channels":
        return [32] * len(value) if policy.sizes else None
    if field in ("image_size", "img_size", "spatial_shapes", "pretrain_image_size") and policy.image:
        return [policy.image] * len(value)
    if field in ("patch_size",) and policy.patch and len(value) == 2:
        return [policy.patch] * len(value)
    if re.fullmatch(
        r"(mlp_only_layers|global_attn_ind.*|fullatt_block_ind.*|deepstack_visual_ind.*|full_attn_ind.*)", field
    ):
        return type(value)([0]) if policy.layers else None
    return None


def _rope(value: dict[str, Any], head_dim: int) -> Any:
    """Returns rope parameters for a small head. The sections of a multimodal rope have to add up to half a head."""
    new = {k: _rope(v, head_dim) or v if isinstance(v, dict) else v for k, v in value.items()}
    section = new.get("mrope_section")
    if section:
        half = int(head_dim * new.get("partial_rotary_factor", 1)) // 2
        new["mrope_section"] = _sections(half)[: len(section)]
    if "original_max_position_embeddings" in new:
        new["original_max_position_embeddings"] = 32
    return new if new != value else None


def _sections(half: int) -> list[int]:
    """Returns three numbers that add up to `half`."""
    return [half - 2 * (half // 4), half // 4, half // 4]


def _number(field: str, value: int, policy: Policy, heads: Any, layers: int) -> Any:
    """Returns a small value for a whole number, or None to leave it."""
    new = next((number for pattern, number in _NUMBERS if pattern.fullmatch(field)), None)
    if new is None or value <= 0:
        return None
    if new == "image":
        return policy.image or None
    if new == "patch":
        return policy.patch if policy.patch and value > policy.patch else None
    if new == "layers":
        return min(value, layers) if policy.layers else None
    if new == "small":
        return min(value, 1)
    if new == "positions":
        return min(value, 64)
    if new == "window":
        return min(value, 4)
    if new == "source":
        return min(value, 64)
    if not policy.sizes and new != TOKENS:
        return None
    if new == "kv":
        if value == 1:
            return 1
        return 4 if heads == value else 2
    if new == 8 and "head" in field:
        return policy.head_dim
    if new in (4, 2, 6) and value < new:
        return value
    if field in ("num_heads", "num_attention_heads", "n_head", "n_heads") and policy.head_dim == 16:
        return 2
    return new


def small_config(
    config: Any, policy: Policy, special: Mapping[str, Any] | None = None, kept: Mapping[str, Any] | None = None
) -> Any:
    """Returns a small config of the same class."""
    special = special or {}
    values = {**(kept or {}), **small_fields(config, policy)}
    for field, value in _fields(config).items():
        if _is_config(value):
            inside = {k.split(".", 1)[1]: v for k, v in special.items() if k.startswith(f"{field}.")}
            values[field] = _small_nested(value, policy, inside)
    if config.model_type == "hgnet_v2":
        values |= _HGNET
    if "embed_dim_per_stage" in values:
        values["hidden_size"] = values["embed_dim_per_stage"][0]
    values |= {k: v for k, v in special.items() if "." not in k}
    try:
        return type(config)(**values)
    except Exception:
        # Some classes take nested configs as dicts only.
        plain = {k: v.to_dict() if _is_config(v) else v for k, v in values.items()}
        return type(config)(**plain)


def _small_nested(config: Any, policy: Policy, special: Mapping[str, Any]) -> Any:
    """Returns a small config for a nested config. Fields that differ from the defaults of its class are kept."""
    if config.model_type == "timm_backbone":
        from transformers import ResNetConfig

        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        return ResNetConfig(**sizes, out_indices=list(config.out_indices or [4]))
    default = _fields(type(config)())
    own = _fields(config)
    kept = {k: v for k, v in own.items() if k in default and not _is_config(v) and v != default[k]}
    kept = {k: v for k, v in kept.items() if k not in UNKEPT}
    if hasattr(config, "out_features") and config.out_indices and config.model_type not in ("swin",):
        # A transformer that returns the features of some layers keeps as many layers.
        layers = own.get("num_hidden_layers")
        if isinstance(layers, int) and len(config.stage_names) == layers + 1:
            special = {"num_hidden_layers": max(2, len(config.out_indices)), **special}
            kept["out_indices"] = list(range(1, len(config.out_indices) + 1))
        else:
            kept["out_indices"] = list(config.out_indices)
    return small_config(config, policy, special, kept)


UNKEPT = {"architectures", "torch_dtype", "dtype", "transformers_version", "id2label", "label2id", "layer_types"}


# ---------------------------------------------------------------------------------------------------------- inputs


def find(config: Any, names: tuple[str, ...], default: Any, first: tuple[str, ...] = ()) -> Any:
    """Returns the value of the first of these fields in a config or in its nested configs."""
    own = _fields(config)
    for name in names:
        if own.get(name) is not None:
            return own[name]
    nested = [own[name] for name in first if name in own] + [v for v in own.values() if _is_config(v)]
    for each in nested:
        if _is_config(each):
            found = find(each, names, None, first)
            if found is not None:
                return found
    return default


VISION = ("vision_config", "image_config", "encoder", "backbone_config")
AUDIO = ("audio_config", "audio_encoder_config", "encoder_config", "speech_config")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(length: int = LENGTH, top: int = FIRST_PLACEHOLDER - 2, seed: int = 0) -> Tensor:
    """Returns random tokens of text, int64 (2, length)."""
    return torch.randint(4, top, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def _side(config: Any) -> tuple[int, int]:
    size = find(config, ("image_size", "img_size"), 64, VISION)
    if isinstance(size, dict):
        return size["height"], size["width"]
    return tuple(size[-2:]) if isinstance(size, (list, tuple)) else (size, size)


def _channels(config: Any) -> int:
    found = find(config, ("num_channels", "in_channels", "in_chans"), 3, VISION)
    return found if isinstance(found, int) else 3


def image(config: Any) -> Tensor:
    """Returns random images, float32 (2, channels, height, width)."""
    return _random(BATCH, _channels(config), *_side(config))


def _frames(config: Any) -> int:
    return find(config, ("num_frames", "frames_per_clip"), 4, VISION)


def video(config: Any) -> Tensor:
    """Returns random videos, float32 (2, frames, channels, height, width)."""
    return _random(BATCH, _frames(config), _channels(config), *_side(config))


def mask(length: int = LENGTH) -> Tensor:
    """Returns a mask, int64 (2, length), in which the second sample is shorter."""
    lengths = torch.tensor([length, max(length * 2 // 3, 1)])
    return (torch.arange(length) < lengths[:, None]).long()


def spectrum(config: Any, names: tuple[str, ...] = ()) -> Tensor:
    """Returns random features of sound, float32 (2, mel bins, time)."""
    bins = find(
        config,
        (*names, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_channels"),
        80,
        AUDIO,
    )
    time = 2 * find(config, ("max_source_positions",), 32, AUDIO)
    return _random(BATCH, bins, time)


def packed(config: Any) -> tuple[Tensor, Tensor]:
    """Returns packed patches of two images, (patches of both, numbers of a patch), and the grid of each, (2, 3)."""
    patch = find(config, ("patch_size",), 8, VISION)
    frames = find(config, ("temporal_patch_size",), 1, VISION)
    merge = find(config, ("spatial_merge_size",), 2, VISION)
    grid = torch.tensor([[1, 2 * merge, 2 * merge]] * BATCH)
    return _random(int(grid.prod(-1).sum()), _channels(config) * frames * patch * patch), grid


def _boxes(length: int = LENGTH, points: int = 4) -> Tensor:
    low = torch.randint(0, 20, (BATCH, length, 2), generator=torch.Generator().manual_seed(1))
    return torch.cat([low, low + 5], -1)


Make = Callable[[Any], Any]
# Name of an argument -> a function of the config that returns its value.
VALUES: dict[str, Make] = {
    "input_ids": lambda c: ids(),
    "attention_mask": lambda c: mask(),
    "decoder_input_ids": lambda c: ids(8, seed=1),
    "pixel_values": image,
    "pixel_values_videos": video,
    "input_values": lambda c: _random(BATCH, 800),
    "input_features": spectrum,
    "bbox": lambda c: _boxes(),
    "visual_feats": lambda c: _random(BATCH, 5, find(c, ("visual_feat_dim",), 32)),
    "visual_pos": lambda c: _random(BATCH, 5, 4).abs(),
    "visual_embeds": lambda c: _random(BATCH, 5, find(c, ("visual_embedding_dim",), 32)),
    "past_values": lambda c: _past(c),
    "past_time_features": lambda c: _random(BATCH, _past(c).shape[1], c.num_time_features),
    "past_observed_mask": lambda c: torch.ones_like(_past(c)),
    "static_categorical_features": lambda c: torch.zeros(BATCH, c.num_static_categorical_features, dtype=torch.long),
    "static_real_features": lambda c: _random(BATCH, c.num_static_real_features),
    "future_values": lambda c: _random(BATCH, c.prediction_length),
    "future_time_features": lambda c: _random(BATCH, c.prediction_length, c.num_time_features),
    "freq": lambda c: torch.zeros(BATCH, dtype=torch.long),
    "states": lambda c: _random(BATCH, 4, c.state_dim),
    "actions": lambda c: _random(BATCH, 4, c.act_dim),
    "rewards": lambda c: _random(BATCH, 4, 1),
    "returns_to_go": lambda c: _random(BATCH, 4, 1),
    "timesteps": lambda c: torch.arange(4).expand(BATCH, 4),
    "pixel_mask": lambda c: torch.ones(BATCH, *_side(c), dtype=torch.long),
    "prompt_pixel_values": lambda c: image(c),
    "prompt_masks": lambda c: image(c),
    "inputs": lambda c: ids(),
    "input_points": lambda c: _random(BATCH, 1, 2, 2).abs(),
    "task_inputs": lambda c: ids(),
    "xpath_tags_seq": lambda c: torch.ones(BATCH, LENGTH, find(c, ("max_depth",), 50), dtype=torch.long),
    "image_grid_thw": lambda c: packed(c)[1],
    "grid_thw": lambda c: packed(c)[1],
    "image_sizes": lambda c: torch.tensor([_side(c)] * BATCH),
    "input_tokens": lambda c: ids(),
    "qformer_input_ids": lambda c: ids(6, seed=2),
    "image_attention_mask": lambda c: torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
    "image": image,
    "images": image,
    "audio_values": lambda c: _random(BATCH, 1, 800),
    "noise": lambda c: None,
}


def _past_length(config: Any) -> int:
    lags = max(getattr(config, "lags_sequence", None) or [0])
    return getattr(config, "context_length", None) or find(config, ("prediction_length",), 16) + lags


def _past(config: Any) -> Tensor:
    if hasattr(config, "lags_sequence"):
        config_length = config.context_length + max(config.lags_sequence)
        return _random(BATCH, config_length)
    channels = getattr(config, "num_input_channels", None)
    return _random(BATCH, _past_length(config), channels) if channels else _random(BATCH, _past_length(config))


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Yields sets of inputs for a model, from the names of the arguments of its forward. The richest comes first."""
    config = model.config
    names = list(inspect.signature(model.forward).parameters)
    needed = [
        name
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]

    def given(*wanted: str, **values: Any) -> dict[str, Any] | None:
        if any(name not in names for name in (*wanted, *values)):
            return None
        made = {
            name: VALUES[name](config) for name in (*wanted, *(n for n in needed if n in VALUES)) if name not in values
        }
        return made | values

    sets: list[dict[str, Any] | None] = []
    shape = torch.Size
    for name in ("hidden_states", "pixel_values"):
        if name in names and "grid_thw" in names:
            patches, grid = packed(config)
            patch = find(config, ("patch_size",), 8, VISION)
            sets.append(given(**{name: patches, "grid_thw": grid}))
            sets.append(given(**{name: patches.repeat(1, 2), "grid_thw": grid}))
            if isinstance(patch, int):
                square = _random(len(patches), _channels(config), patch, patch)
                sets.append(given(**{name: square, "grid_thw": grid}))
                sets.append(given(**{name: square, "grid_thw": grid[:, 1:]}))
    if "input_ids" in names and "pixel_values" in names:
        sets += list(_with_images(model, config, names, given))
    if "input_ids" in names and ("input_features" in names or "input_values" in names):
        sets += list(_with_sounds(model, config, names, given))
    if "input_ids" in names:
        for extra in (
            ("pixel_values",),
            ("bbox",),
            ("visual_feats", "visual_pos"),
            ("input_features",),
            ("input_values",),
        ):
            for text in (("input_ids", "attention_mask"), ("input_ids",)):
                sets.append(given(*text, *extra))
                if "decoder_input_ids" in names:
                    sets.append(given(*text, *extra, "decoder_input_ids"))
        for text in (("input_ids", "attention_mask"), ("input_ids",)):
            if "decoder_input_ids" in names:
                sets.append(given(*text, "decoder_input_ids"))
            sets.append(given(*text))
    if "input_ids" in names and "pixel_values" in names:
        sets.append(given("input_ids", "attention_mask", pixel_values=image(config)[:, None]))
        sets.append(given("input_ids", "attention_mask", "image_attention_mask", pixel_values=image(config)[:, None]))
        if "pixel_values_videos" not in names:
            sets.append(given("input_ids", "attention_mask", pixel_values=video(config)))
    if "past_values" in names:
        more = [n for n in names if n in VALUES and n.startswith(("past", "future"))]
        sets += [given(*more), given("past_values", "past_observed_mask"), given("past_values")]
        if "past_values_mask" in names:
            sets.append(given("past_values"))
        length = _past_length(config)
        sets.append(given(past_values=[_random(length, seed=s) for s in range(BATCH)]))
    if "states" in names:
        sets.append(given("states", "actions", "rewards", "returns_to_go", "timesteps"))
    if "pixel_values" in names:
        sets += [given("pixel_values", "input_points"), given("pixel_values", "pixel_mask"), given("pixel_values")]
        sets += [given("pixel_values", "decoder_input_ids"), given("pixel_values", "task_inputs")]
        sets += [given("pixel_values", "prompt_pixel_values", "prompt_masks")]
        sets.append(given(pixel_values=video(config)))
        sets.append(given(pixel_values=video(config).transpose(1, 2)))
        patch = find(config, ("patch_size",), 8, VISION)
        if isinstance(patch, int):
            flat = _random(BATCH, 16, _channels(config) * patch * patch)
            where = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
            sets.append(
                given(
                    pixel_values=flat,
                    spatial_shapes=torch.tensor([[4, 4]] * BATCH),
                    pixel_attention_mask=torch.ones(BATCH, 16, dtype=torch.long),
                )
            )
            sets.append(given(pixel_values=flat, pixel_position_ids=where.expand(BATCH, 16, 2)))
            side = 4 * patch
            sets.append(given(pixel_values=_random(BATCH, _channels(config), side, side)))
        if isinstance(patch, int) and "target_sizes" in names:
            strip = _random(BATCH, _channels(config), patch, 16 * patch)
            whole = strip.transpose(0, 1).transpose(1, 2).reshape(1, _channels(config), patch, -1)
            sizes = torch.tensor([[4, 4]] * BATCH)
            sets += [given(pixel_values=strip, target_sizes=sizes), given(pixel_values=whole, target_sizes=sizes)]
        sets.append(given(pixel_values=_random(BATCH, 2, _channels(config), *_side(config))))
        for side in (32, 48, 64, 128, 224):
            sets.append(given(pixel_values=_random(BATCH, _channels(config), side, side)))
    for name in ("pixel_values_videos", "video", "videos"):
        if name in names:
            sets.append(given(**{name: video(config)}))
    features = [spectrum(config), spectrum(config).transpose(1, 2)]
    width = find(config, ("feature_projection_input_dim", "input_dim", "hidden_size"), 80, AUDIO)
    features += [
        _random(BATCH, 128, 64),
        _random(BATCH, 64, 128),
        _random(BATCH, 64, width),
        _random(BATCH, 1, *features[1].shape[1:]),
    ]
    for name in ("input_features", "input_values", "audio_values", "input_audio", "features"):
        if name not in names:
            continue
        tail = ("decoder_input_ids",) if "decoder_input_ids" in names else ()
        waves = [_random(BATCH, 800), _random(BATCH, 1, 800), _random(BATCH, 1, 4096), _random(BATCH, 4096)]
        length = find(config, ("max_length",), 64)
        waves.append(_random(BATCH, length, find(config, ("num_mel_bins",), 80)))
        for value in (*waves, *features) if name != "input_features" else (*features, *waves):
            sets += [given(*tail, **{name: value})] + ([given(**{name: value})] if tail else [])
            for flag in ("attention_mask", "input_features_mask", "padding_mask", "feature_attention_mask"):
                if flag in names:
                    sets.append(
                        given(*tail, **{name: value, flag: torch.ones(BATCH, value.shape[-1], dtype=torch.long)})
                    )
                    sets.append(
                        given(*tail, **{name: value, flag: torch.ones(BATCH, value.shape[1], dtype=torch.long)})
                    )
    for name in ("hidden_states", "inputs_embeds", "encoder_hidden_states", "query_embeds"):
        if name in names:
            width = find(config, ("hidden_size", "d_model", "embed_dim"), 32)
            if isinstance(width, int):
                sets.append(given(**{name: _random(BATCH, LENGTH, width)}))
    if "inputs" in names:
        sets += [given("inputs"), given(inputs=_random(BATCH, LENGTH, find(config, ("d_model",), 32)))]
    if "query_embeds" in names:
        width = find(config, ("encoder_hidden_size",), 32)
        sets.append(given(query_embeds=_random(BATCH, 6, 32), encoder_hidden_states=_random(BATCH, 9, width)))
    done: list[Any] = []
    for each in sets:
        if each is None or any(name not in each for name in needed):
            continue
        key = {k: (v.shape if isinstance(v, Tensor) else shape()) for k, v in each.items()}
        if key not in done:
            done.append(key)
            yield each


def _with_images(model: Any, config: Any, names: list[str], given: Callable[..., Any]) -> Iterator[Any]:
    """Yields text with placeholders of images, and images.

    How many placeholders an image needs is in the error message that a wrong number causes.
    """
    token = find(config, ("image_token_id", "image_token_index"), None)
    if not isinstance(token, int) or not 0 <= token < TOKENS:
        return
    variants = []
    if "image_grid_thw" in names:
        patches, grid = packed(config)
        variants.append({"pixel_values": patches, "image_grid_thw": grid})
    images = image(config)
    variants.append({"pixel_values": images})
    if "image_sizes" in names:
        variants += [{"pixel_values": images, "image_sizes": torch.tensor([_side(config)] * BATCH)}]
        variants += [
            {
                "pixel_values": images[:, None].repeat(1, 3, 1, 1, 1),
                "image_sizes": torch.tensor([_side(config)] * BATCH),
            }
        ]
    variants.append({"pixel_values": images[:, None]})
    yield from _with_placeholders(model, token, variants, names, given, r"features:? ?(?:torch.Size\(\[)?(\d+)")


def _with_sounds(model: Any, config: Any, names: list[str], given: Callable[..., Any]) -> Iterator[Any]:
    """Yields text with placeholders of sounds, and sounds."""
    token = find(config, ("audio_token_id", "audio_token_index", "speech_token_id"), None)
    if not isinstance(token, int) or not 0 <= token < TOKENS:
        return
    variants = []
    for name in ("input_features", "input_values"):
        if name in names:
            sound = spectrum(config)
            flag = next((n for n in ("feature_attention_mask", "input_features_mask") if n in names), None)
            for each in (sound, sound.transpose(1, 2)):
                time = sound.shape[-1]
                ones = {flag: torch.ones(BATCH, time, dtype=torch.long)} if flag else {}
                variants.append({name: each, **ones})
    yield from _with_placeholders(model, token, variants, names, given, r"features:? ?(?:torch.Size\(\[)?(\d+)")


def _with_placeholders(
    model: Any, token: int, variants: list[Any], names: list[str], given: Callable[..., Any], pattern: str
) -> Iterator[Any]:
    for variant in variants:
        count = 4
        for _ in range(2):
            text = ids()
            text = torch.cat([text[:, :2], torch.full((BATCH, count), token), text[:, 2:]], 1)
            more = {}
            if "attention_mask" in names:
                more["attention_mask"] = torch.ones_like(text)
            for kind in ("mm_token_type_ids", "token_type_ids"):
                if kind in names and kind == "mm_token_type_ids":
                    more[kind] = (text == token).long()
            full = given(input_ids=text, **more, **variant)
            if full is None:
                break
            try:
                with torch.no_grad():
                    model(**full)
            except Exception as error:
                wanted = re.findall(pattern, str(error))
                wanted = int(wanted[-1]) if wanted else 0
                if not wanted or wanted % BATCH or wanted > 2000 or wanted // BATCH == count:
                    break
                count = wanted // BATCH
                continue
            yield full
            break


# ----------------------------------------------------------------------------------------------------------- build


def tensors_of(value: Any) -> list[Tensor]:
    """Returns all tensors in the outputs of a model, in a fixed order. Caches are left out."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for each in value.values() for t in tensors_of(each)]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in tensors_of(each)]
    return []


def _runs(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Returns "" if the forward returns finite tensors, else the reason why not."""
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            found = [t for t in tensors_of(model(**inputs)) if t.is_floating_point()]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    if not found:
        return "the forward returns no tensor"
    if any(torch.isnan(t).any() for t in found):
        return "the forward returns NaN"
    return ""


def _parameters(kind: Any, config: Any) -> int:
    """Returns the number of parameters without allocating them. 0 if the model cannot be built on the meta device."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in kind(config).parameters())
    except Exception:
        return 0


def build(name: str) -> Built:
    """Builds a small model of a type of transformers.

    Args:
        name: A name in TYPES.

    Raises:
        NotBuilt: No policy works.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    if name in NOT_BUILT:
        raise NotBuilt(NOT_BUILT[name])
    special = SPECIAL.get(name, {})
    problems: list[str] = []
    try:
        default = CONFIG_MAPPING[special.get("from", name)]()
    except KeyError:
        raise NotBuilt("it has no config class of its own") from None
    except Exception as error:
        raise NotBuilt(f"its default config fails: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    for cls in classes(name, default):
        kind = getattr(transformers, cls, None)
        if kind is None:
            problems.append(f"transformers has no {cls}")
            continue
        for policy in POLICIES:
            try:
                config = small_config(default, policy, special.get("config"))
                count = _parameters(kind, config)
                # A policy that keeps large fields could need the memory of the full model.
                if count > special.get("largest", LARGEST) or (not count and not (policy.sizes and policy.layers)):
                    problems.append(f"{cls}, {policy.name}: more than {LARGEST} parameters")
                    continue
                torch.manual_seed(0)
                model = kind(config).eval().float()
            except Exception as error:
                first = str(error).strip().splitlines() or [""]
                problems.append(f"{cls}, {policy.name}: {type(error).__name__}: {' '.join(first[:2])}"[:300])
                continue
            if sum(p.numel() for p in model.parameters()) > special.get("largest", LARGEST):
                problems.append(f"{cls}, {policy.name}: more than {LARGEST} parameters")
                continue
            tried = []
            wanted = special.get("inputs")
            for inputs in [wanted(model)] if wanted else candidates(model):
                why = _runs(model, inputs)
                if not why:
                    return Built(model, inputs, policy.name)
                tried.append(f"{'+'.join(inputs)}: {why}")
            problems.append(
                f"{cls}, {policy.name}: "
                + (
                    tried[0]
                    if tried
                    else "no inputs fit its forward: " + ", ".join(inspect.signature(model.forward).parameters)
                )
            )
            problems += [f"   {each}" for each in tried[1:]]
    error = NotBuilt(problems[0] if problems else "no class")
    error.problems = problems  # type: ignore[attr-defined]
    raise error
