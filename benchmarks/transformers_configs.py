"""Makes the configs of transformers small.

Fields are recognised by their names. A `Policy` says which fields are made small.
`benchmarks.transformers_models` tries several policies.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.transformers_inputs import FIRST_PLACEHOLDER, TOKENS, fields_of, is_config

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
        r"|num_encoder_layers|num_decoder_layers|.*_depth|.*_layers|num_blocks|num_encoder_blocks|n_blocks|num_self_attends_per_block)",
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
    (
        r"(x4_feat_dim|fusion_hidden_size|neck_out_channels|stem_channels|num_filters|.*predictor_channels|postnet_units)",
        16,
    ),
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


# The sizes of a backbone that several detectors have.
HGNET = {
    "hidden_sizes": [16, 64, 128, 256],
    "stem_channels": (3, 4, 6),
    "stage_in_channels": (6, 16, 64, 128),
    "stage_mid_channels": (6, 12, 24, 48),
    "stage_out_channels": (16, 64, 128, 256),
    "stage_num_blocks": (1, 1, 1, 1),
    "stage_numb_of_layers": (2, 2, 2, 2),
}


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


def _power(values: list[int], least: int = 8) -> list[int]:
    """Divides all sizes by the largest power of two that leaves multiples of `least`."""
    while all(v % (2 * least) == 0 for v in values):
        values = [v // 2 for v in values]
    return values


def small_fields(config: Any, policy: Policy) -> dict[str, Any]:
    """Returns the fields of a config, without nested configs, that the policy changes."""
    own, out = fields_of(config), {}
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
    if chosen and len(value) == count and isinstance(value[0], (str, bool, int)):
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
    for field, value in fields_of(config).items():
        if is_config(value):
            inside = {k.split(".", 1)[1]: v for k, v in special.items() if k.startswith(f"{field}.")}
            values[field] = _small_nested(value, policy, inside)
    if config.model_type == "hgnet_v2":
        values |= HGNET
    if "embed_dim_per_stage" in values:
        values["hidden_size"] = values["embed_dim_per_stage"][0]
    values |= {k: v for k, v in special.items() if "." not in k}
    try:
        return type(config)(**values)
    except Exception:
        # Some classes take nested configs as dicts only.
        plain = {k: v.to_dict() if is_config(v) else v for k, v in values.items()}
        return type(config)(**plain)


# Fields that belong to the large model, or that follow from other fields.
UNKEPT = {"architectures", "torch_dtype", "dtype", "transformers_version", "id2label", "label2id", "layer_types"}


def _small_nested(config: Any, policy: Policy, special: Mapping[str, Any]) -> Any:
    """Returns a small config for a nested config. Fields that differ from the defaults of its class are kept."""
    if config.model_type == "timm_backbone":
        from transformers import ResNetConfig

        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        return ResNetConfig(**sizes, out_indices=list(config.out_indices or [4]))
    default = fields_of(type(config)())
    own = fields_of(config)
    kept = {k: v for k, v in own.items() if k in default and not is_config(v) and v != default[k]}
    kept = {k: v for k, v in kept.items() if k not in UNKEPT}
    if hasattr(config, "out_features") and config.out_indices:
        # A transformer that returns the features of some layers keeps as many layers.
        layers = own.get("num_hidden_layers")
        if isinstance(layers, int) and "depths" not in own and len(config.stage_names) == layers + 1:
            special = {"num_hidden_layers": max(2, len(config.out_indices)), **special}
            kept["out_indices"] = list(range(1, len(config.out_indices) + 1))
        else:
            kept["out_indices"] = list(config.out_indices)
    return small_config(config, policy, special, kept)
