"""Tiny random models of timm's hybrid families: (builder, image size, the adapter that has to serve it)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.metaformer import Attention, Pooling, SepConv
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

CLASSES = 7


def tiny(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """A timm model of that name, made small."""
    return lambda: timm.create_model(name, num_classes=CLASSES, **kwargs)


def maxxvit(block: Any = ("C", "T"), conv: Any = None, **kwargs: Any) -> Callable[[], nn.Module]:
    """A MaxViT, CoAtNet or MaxxViT of one stage."""
    transformer = MaxxVitTransformerCfg(dim_head=8, window_size=(2, 2), grid_size=(2, 2), **kwargs)
    cfg = MaxxVitCfg((16, 24), (1, 1), ("C", block), 8, conv_cfg=conv or MaxxVitConvCfg(), transformer_cfg=transformer)
    return lambda: MaxxVit(cfg, img_size=32, num_classes=CLASSES)


def mvit(**kwargs: Any) -> Callable[[], nn.Module]:
    """An MViTv2 of two blocks, of which the second halves the map and doubles the heads."""
    cfg = MultiScaleVitCfg(
        depths=(1, 1), embed_dim=(16, 32), num_heads=(2, 4), stride_q=((1, 1), (2, 2)), **kwargs
    )
    return lambda: MultiScaleVit(cfg, img_size=32, num_classes=CLASSES)


def byob(layer: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """A ByobNet whose last block attends."""
    blocks = ByoBlockCfg("bottle", d=1, c=32, s=1, gs=0, br=0.5), ByoBlockCfg("self_attn", d=2, c=32, s=2, gs=0, br=1.0)
    cfg = ByoModelCfg(blocks, stem_chs=8, self_attn_layer=layer, self_attn_kwargs=kwargs, fixed_input_size=True)
    return lambda: ByobNet(cfg, num_classes=CLASSES, img_size=32)


CONV_NEXT: dict[str, Any] = {"depths": (1, 1), "dims": (8, 16)}

Model = tuple[Callable[[], nn.Module], int, str | None]
TIMM_HYBRID_MODELS: dict[str, Model] = {
    "mvitv2": (mvit(), 32, "timm-mvitv2"),
    "mvitv2 average pooling": (mvit(mode="avg", use_cls_token=True), 32, "timm-mvitv2"),
    "coatnet": (maxxvit("T", head_first=True, rel_pos_type="bias"), 32, "timm-maxvit"),
    "coatnet mlp": (maxxvit("T", head_first=False, rel_pos_type="mlp"), 32, "timm-maxvit-qkv-first"),
    "maxvit": (maxxvit("M", head_first=True, use_nchw_attn=True), 32, "timm-maxvit"),
    "maxvit tf": (maxxvit("M", head_first=False, rel_pos_type="bias_tf"), 32, "timm-maxvit-tf"),
    "maxvit parallel": (maxxvit("PM", head_first=True, rel_pos_type="mlp"), 32, "timm-maxvit"),
    "maxxvit": (maxxvit("M", MaxxVitConvCfg(block_type="convnext")), 32, "timm-maxvit"),
    "levit": (
        tiny("levit_128s", img_size=64, embed_dim=(16, 24), key_dim=4, depth=(1, 1), num_heads=(2, 3)),
        64,
        "timm-levit",
    ),
    "levit conv": (
        tiny("levit_128s", img_size=64, embed_dim=(16, 24), key_dim=4, depth=(1, 1), num_heads=(2, 3), use_conv=True),
        64,
        "timm-levit-downsample",
    ),
    "coat": (
        tiny("coat_tiny", img_size=32, patch_size=2, embed_dims=(16,) * 4, serial_depths=(1,) * 4, parallel_depth=1),
        32,
        None,
    ),
    "edgenext": (
        tiny("edgenext_xx_small", depths=(1, 2), dims=(16, 24), global_block_counts=(0, 1), heads=(2, 3)),
        32,
        "timm-edgenext",
    ),
    "efficientformer": (
        tiny("efficientformer_l1", img_size=64, depths=(1, 1, 1, 2), embed_dims=(8, 8, 8, 16), num_vit=1),
        64,
        "timm-efficientformer",
    ),
    "efficientformerv2": (
        tiny("efficientformerv2_s0", img_size=64, depths=(1, 1, 1, 1), embed_dims=(8, 8, 8, 16), num_vit=1),
        64,
        "timm-efficientformerv2",
    ),
    "fastvit": (
        tiny(
            "fastvit_t8",
            layers=(1, 1),
            embed_dims=(16, 64),
            mlp_ratios=(2, 2),
            token_mixers=("repmixer", "attention"),
            downsamples=(False, True),
            se_downsamples=(False, False),
            pos_embs=(None, None),
        ),
        32,
        "timm-fastvit",
    ),
    "focalnet": (tiny("focalnet_tiny_srf", depths=(1, 1), embed_dim=16, focal_levels=(2, 2)), 32, None),
    "mobilevit": (tiny("mobilevit_xxs"), 64, "timm-attention"),
    "mobilevitv2": (tiny("mobilevitv2_050"), 64, None),
    "nextvit": (
        tiny("nextvit_small", stem_chs=(8, 8, 8), depths=(1, 1, 1, 1), head_dim=16),
        32,
        "timm-nextvit",
    ),
    "pit": (
        tiny("pit_ti_224", img_size=32, patch_size=4, stride=4, base_dims=(8, 8), depth=(1, 1), heads=(2, 4)),
        32,
        "timm-attention",
    ),
    "poolformer": (tiny("poolformer_s12", **CONV_NEXT, token_mixers=Pooling), 32, None),
    "caformer": (
        tiny("caformer_s18", depths=(1, 1), dims=(8, 64), token_mixers=[SepConv, Attention]),
        32,
        "timm-metaformer",
    ),
    "swiftformer": (tiny("swiftformer_xs", layers=(1, 1, 1, 1), embed_dims=(8, 8, 8, 8)), 32, None),
    "tinyvit": (
        tiny(
            "tiny_vit_5m_224",
            img_size=32,
            embed_dims=(8, 16, 24, 24),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 3, 3),
            window_sizes=(2, 2, 2, 1),
        ),
        32,
        "timm-tinyvit",
    ),
    "vitamin": (tiny("vitamin_small_224", img_size=32, depth=1), 32, "timm-attention"),
    "mixer": (tiny("mixer_s32_224", img_size=32, patch_size=8, embed_dim=16, num_blocks=1), 32, None),
    "gmixer": (tiny("gmixer_12_224", img_size=32, patch_size=8, embed_dim=16, num_blocks=1), 32, "timm-glu"),
    "gmlp": (tiny("gmlp_ti16_224", img_size=32, patch_size=8, embed_dim=16, num_blocks=1), 32, "timm-gated-mlp"),
    "resmlp": (tiny("resmlp_12_224", img_size=32, patch_size=8, embed_dim=16, num_blocks=1), 32, None),
    "convnext": (tiny("convnext_atto", **CONV_NEXT), 32, None),
    "convnextv2": (tiny("convnextv2_atto", **CONV_NEXT, conv_mlp=False), 32, "timm-grn-mlp"),
    "convnextv2 conv mlp": (tiny("convnextv2_atto", **CONV_NEXT, conv_mlp=True), 32, "timm-grn-mlp"),
    "efficientvit mit": (tiny("efficientvit_b0", widths=(8, 8, 8, 16, 16), depths=(1, 1, 1, 1, 1), head_widths=(16, 16)), 32, None),
    "efficientvit msra": (
        tiny("efficientvit_m0", img_size=64, embed_dim=(16, 16, 24), key_dim=(4, 4, 4), depth=(1, 1, 1), num_heads=(2, 2, 2)),
        64,
        None,
    ),
    "botnet": (byob("bottleneck"), 32, "timm-bottleneck"),
    "halonet": (byob("halo", block_size=2, halo_size=1), 32, "timm-halo"),
    "mobilenetv4 hybrid": (tiny("mobilenetv4_hybrid_medium", channel_multiplier=0.25), 64, "timm-multi-query"),
    "shvit": (tiny("shvit_s1", embed_dim=(16, 16, 16), partial_dim=(8, 8, 8), depth=(1, 1, 1)), 64, None),
    "lowformer": (tiny("lowformer_b0", width_list=(8, 8, 8, 64, 64), depth_list=(0, 1, 1, 1, 1)), 32, "timm-lowformer"),
    "iformer": (tiny("iformer_t", dims=(8, 8, 8, 8), depths=(1, 1, 4, 3), attn_groups=(0, 0, 1, 1)), 32, None),
    "inception next": (tiny("inception_next_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), 32, None),
    "repvit": (tiny("repvit_m0_9", embed_dim=(8, 8, 8, 8), depth=(1, 1, 1, 1)), 32, None),
}
__all__ = ["TIMM_HYBRID_MODELS", "partial"]
