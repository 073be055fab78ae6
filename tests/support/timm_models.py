"""Tiny random models of the ViT families of timm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.models.gcvit import GlobalContextVit
from timm.models.nest import Nest
from timm.models.vision_transformer import ParallelThingsBlock
from timm.models.volo import VOLO
from torch import nn

SIZE, CLASSES = 32, 7
TINY: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (8, 12, 16, 16), "num_heads": (2, 3, 2, 2)}


def tiny(name: str, *without: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds a timm model with the settings of TINY, except those in `without`."""
    settings = {key: value for key, value in TINY.items() if key not in without}
    return lambda: timm.create_model(name, num_classes=CLASSES, **{**settings, **kwargs})


def other(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds a timm model with these settings."""
    return lambda: timm.create_model(name, num_classes=CLASSES, **kwargs)


def run_once(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Returns a function that builds the model and calls it once, since the first call sets the size of its buffers."""

    def built() -> nn.Module:
        model = build().eval()
        model(torch.zeros(1, 3, SIZE, SIZE))
        return model

    return built


# Name -> (a function that builds the model, the adapters that have to give its sites)
TIMM_VIT: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "eva": (tiny("eva02_tiny_patch14_224"), ("timm-eva",)),
    "eva fused": (tiny("eva_giant_patch14_224"), ("timm-eva",)),
    "mixed rope": (tiny("vit_small_patch16_rope_mixed_224"), ("timm-rope",)),
    "mixed rope eva": (tiny("vit_small_patch16_rope_mixed_224", attn_type="eva", scale_attn_inner=True), ("timm-eva",)),
    "grouped queries": (
        tiny("vit_small_patch16_rope_224", qkv_fused=False, num_heads=6, num_kv_heads=3),
        ("timm-rope",),
    ),
    "beit": (tiny("beit_base_patch16_224"), ("timm-beit",)),
    "beit shared": (
        tiny("beitv2_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
        ("timm-beit",),
    ),
    "beit3": (tiny("beit3_base_patch16_224"), ("timm-attention",)),
    "relpos": (tiny("vit_relpos_small_patch16_224"), ("timm-relpos",)),
    "relpos table": (tiny("vit_relpos_small_patch16_224", rel_pos_type="bias", class_token=True), ("timm-relpos",)),
    "relpos shared": (tiny("vit_srelpos_small_patch16_224"), ("timm-relpos",)),
    "diff": (tiny("vit_dwee_patch16_reg1_gap_256"), ("timm-diff",)),
    "parallel things": (tiny("vit_small_patch16_36x1_224", block_fn=ParallelThingsBlock), ("timm-attention",)),
    "sam": (
        tiny("samvit_base_patch16", window_size=2, global_attn_indexes=(1,), neck_chans=8, num_heads=3),
        ("timm-sam",),
    ),
    "rope": (tiny("vit_medium_patch16_rope_reg1_gap_256"), ("timm-eva",)),
    "naflex": (tiny("naflexvit_base_patch16_gap", "img_size"), ("timm-attention",)),
    "deepseek": (tiny("deepseek_vit_412m", "img_size", img_size=48), ("timm-rope",)),
    "qwen3": (tiny("qwen3_vit_88m", pos_embed_grid_size=4), ("timm-rope",)),
    "gemma4": (
        tiny("gemma4_vit_167m", "patch_size", head_dim=8, intermediate_size=32, num_kv_heads=3, num_heads=6),
        ("timm-gemma4",),
    ),
    "cait": (tiny("cait_xxs24_224", depth_token_only=1), ("timm-class-attention",)),
    "xcit": (tiny("xcit_nano_12_p8_224", cls_attn_layers=1), ("timm-xcit", "timm-class-attention")),
    "pvt": (other("pvt_v2_b0", **STAGES, mlp_ratios=(2,) * 4), ("timm-pvt",)),
    "pvt linear": (other("pvt_v2_b2_li", **STAGES, mlp_ratios=(2,) * 4), ("timm-pvt",)),
    "twins pcpvt": (other("twins_pcpvt_small", img_size=SIZE, **STAGES, mlp_ratios=(2,) * 4), ("timm-twins-global",)),
    "twins svt": (
        other(
            "twins_svt_small",
            img_size=SIZE,
            **{**STAGES, "depths": (2, 2, 1, 1)},
            mlp_ratios=(2,) * 4,
            wss=(3, 2, 2, 2),
        ),
        ("timm-twins-local", "timm-twins-global"),
    ),
    "crossvit": (
        other(
            "crossvit_tiny_240",
            img_size=48,
            img_scale=(1.0, 2 / 3),
            embed_dim=(12, 24),
            depth=((1, 1, 0), (1, 1, 0)),
            num_heads=(3, 3),
        ),
        ("timm-crossvit", "timm-attention"),
    ),
    "convit": (
        run_once(tiny("convit_tiny", local_up_to_layer=1)),
        ("timm-convit", "timm-convit-gpsa"),
    ),
    "tnt": (
        tiny("tnt_s_patch16_224", "num_heads", inner_dim=8, num_heads_inner=2, num_heads_outer=3, first_stride=4),
        ("timm-tnt",),
    ),
    "volo": (
        partial(
            VOLO,
            num_classes=CLASSES,
            use_aux_head=False,
            img_size=64,
            layers=(1, 1, 1, 1),
            embed_dims=(12, 24, 24, 24),
            num_heads=(3, 3, 3, 3),
            stem_hidden_dim=8,
        ),
        ("timm-volo", "timm-volo-outlook", "timm-volo-class"),
    ),
    "nest": (
        partial(
            Nest, num_classes=CLASSES, img_size=SIZE, embed_dims=(8, 16, 24), num_heads=(2, 2, 3), depths=(1, 1, 1)
        ),
        ("timm-nest",),
    ),
    "visformer": (
        other("visformer_tiny", img_size=SIZE, init_channels=8, embed_dim=48, depth=(1, 1, 1), num_heads=3),
        ("timm-visformer", "timm-visformer-mlp"),
    ),
    "hiera": (
        other("hiera_tiny_224", img_size=64, embed_dim=8, num_heads=2, stages=(1, 1, 1, 1), mask_unit_size=(8, 8)),
        ("timm-hiera",),
    ),
    "hieradet": (
        other(
            "sam2_hiera_tiny",
            embed_dim=8,
            num_heads=2,
            stages=(1, 2, 1, 1),
            global_att_blocks=(2,),
            window_spec=(4, 4, 4, 4),
        ),
        ("timm-hieradet",),
    ),
    "swinv2 cr": (
        other("swinv2_cr_tiny_224", img_size=64, embed_dim=12, depths=(2, 1), num_heads=(2, 3), window_size=4),
        ("timm-swinv2-cr",),
    ),
    "gcvit": (
        partial(
            GlobalContextVit,
            num_classes=CLASSES,
            img_size=64,
            embed_dim=8,
            depths=(2, 2),
            num_heads=(2, 4),
            window_ratio=(32, 16),
        ),
        ("timm-gcvit",),
    ),
    "davit": (
        other("davit_tiny", embed_dims=(8, 12), num_heads=(2, 3), depths=(1, 1)),
        ("timm-davit", "timm-davit-channel"),
    ),
    "davit v2": (
        other(
            "davit_tiny",
            embed_dims=(8, 12),
            num_heads=(2, 3),
            depths=(1, 1),
            channel_attn_v2=True,
        ),
        ("timm-davit-channel-v2",),
    ),
}

SIZES = {"volo": 64, "hiera": 64, "hieradet": 64, "swinv2 cr": 64, "gcvit": 64, "deepseek": 48, "crossvit": 48}
"""Name -> height and width of the images, for the models that do not take SIZE."""
