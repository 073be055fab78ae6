"""What the names of fields and arguments do not tell about single types of transformers.

`SPECIAL` says how a type is built. `NOT_BUILT` says why a type is not built.
"""

from typing import Any

import torch

from benchmarks.transformers_inputs import FIRST_PLACEHOLDER, LENGTH, boxes, ids, image, mask, normal, packed

_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2}
_ROPE_BY_KIND = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
_SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
    "ngram_vocab_size_base": 96,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
}
# Type -> a dict with one or more of these keys:
#   "config": values of fields. A name with a dot is a field of a nested config.
#   "inputs": a function of the model that returns its inputs.
#   "class": the name of the model's class.
#   "from": the type whose config is used.
#   "largest": the largest number of parameters.
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
        "inputs": lambda m: {"input_ids": ids(), "attention_mask": mask(), "input_features": normal(2, 1, 256, 64)},
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
    "deepseek_ocr2": {
        "config": {
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "vision_config.sam_config.downsample_channels": [32, 32],
        }
    },
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
    "dots3_note": {"config": {f"text_config.{field}": value for field, value in _SLIDING.items()}},
    "dots3_note_text": {"config": _SLIDING},
    "llama4": {"class": "Llama4ForConditionalGeneration", "config": {"vision_config.intermediate_size": 128}},
    "fastspeech2_conformer": {"largest": 4_000_000},
    "fun_asr_nano": {"config": {"adaptor_config.intermediate_size": 8}},
    "fun_asr_nano_encoder": {
        "inputs": lambda m: {"input_features": normal(2, 16, 560), "input_features_mask": torch.ones(2, 16).long()}
    },
    "gemma3n_text": {"config": {"num_kv_shared_layers": 0, "intermediate_size": 48}},
    "gemma3n_audio": {
        "inputs": lambda m: {"audio_mel": normal(2, 64, 128), "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool)}
    },
    "glm5_next": {"config": {"text_config.index_topk": 16}},
    "glm5_next_text": {"config": {"index_topk": 16}},
    "granite_speech5_ctc": {"inputs": lambda m: {"input_features": normal(2, 16, 320)}},
    "granite_speech5_encoder": {"inputs": lambda m: {"input_features": normal(2, 16, 320)}},
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
    "muse_spark_audio": {"inputs": lambda m: {"input_values": normal(2, 3840)}},
    "musicgen": {"from": "musicgen_decoder", "class": "MusicgenForCausalLM"},
    "musicgen_melody": {"from": "musicgen_melody_decoder", "class": "MusicgenMelodyForCausalLM"},
    "phi4_multimodal": {"largest": 4_000_000},
    "lw_detr": {"config": {"backbone_config.num_windows": 4}},
    **{
        name: {"config": {f"{prefix}{field}": value for field, value in _INDEXER.items()}}
        for name, prefix in (("qwen4_exp", "text_config."), ("qwen4_exp_text", ""))
    },
    "qwen3_asr_encoder": {
        "config": {"n_window": 50},
        "inputs": lambda m: {"input_features": normal(2, 128, 100), "input_features_mask": torch.ones(2, 100).long()},
    },
    "seggpt": {
        "config": {
            "image_size": [64, 32],
            "num_hidden_layers": 4,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1, 2, 3],
        },
        "inputs": lambda m: {
            "pixel_values": normal(2, 3, 32, 32),
            "prompt_pixel_values": normal(2, 3, 32, 32, seed=1),
            "prompt_masks": normal(2, 3, 32, 32, seed=2),
        },
    },
    "siglip2": {
        "inputs": lambda m: {
            "input_ids": ids(),
            "pixel_values": normal(2, 16, 3 * 64),
            "pixel_attention_mask": torch.ones(2, 16).long(),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
    },
    "time_series_transformer": {"config": _SERIES},
    "timesfm": {
        "config": {"context_length": 64, "horizon_length": 8},
        "inputs": lambda m: {
            "past_values": normal(2, 64),
            "past_values_padding": torch.zeros(2, 64).long(),
            "freq": torch.zeros(2, 1).long(),
        },
    },
    "udop": {
        "inputs": lambda m: {
            "input_ids": ids(),
            "attention_mask": mask(),
            "bbox": boxes().float() / 100,
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
        "inputs": lambda m: {"input_values": normal(2, 4096), "decoder_input_ids": ids(8, seed=1)},
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
