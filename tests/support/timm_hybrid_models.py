"""Tiny random models of the families of timm that mix attention or MLPs with convolutions."""

from collections.abc import Callable
from typing import Any

import timm
from timm.layers import GatedMlp, GluMlp, Mlp
from timm.models._efficientnet_blocks import MobileAttention, SqueezeExcite, UniversalInvertedResidual
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.convnext import ConvNeXt
from timm.models.focalnet import FocalNet
from timm.models.lowformer import ConvAttention
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, Pooling, SepConv
from timm.models.mlp_mixer import MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nextvit import EfficientAttention
from torch import Tensor, nn

CLASSES = 7


def tiny(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds a timm model with these settings."""
    return lambda: timm.create_model(name, num_classes=CLASSES, **kwargs)


def maxxvit(block: str = "T", conv: Any = None, **kwargs: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds a MaxViT, CoAtNet or MaxxViT with one block of each stage."""
    transformer = MaxxVitTransformerCfg(dim_head=16, window_size=(2, 2), grid_size=(2, 2), **kwargs)
    cfg = MaxxVitCfg((16, 32), (1, 1), ("C", block), 8, conv_cfg=conv or MaxxVitConvCfg(), transformer_cfg=transformer)
    return lambda: MaxxVit(cfg, img_size=32, num_classes=CLASSES)


def mvit(**kwargs: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds an MViTv2 of two blocks. The second halves the image and doubles the heads."""
    cfg = MultiScaleVitCfg(depths=(1, 1), embed_dim=(16, 32), num_heads=(2, 4), stride_q=((1, 1), (2, 2)), **kwargs)
    return lambda: MultiScaleVit(cfg, img_size=32, num_classes=CLASSES)


def byob(layer: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds a ByobNet whose last block is an attention."""
    blocks = ByoBlockCfg("bottle", d=1, c=32, s=1, gs=0, br=0.5), ByoBlockCfg("self_attn", d=2, c=32, s=2, gs=0, br=1.0)
    cfg = ByoModelCfg(blocks, stem_chs=8, self_attn_layer=layer, self_attn_kwargs=kwargs, fixed_input_size=True)
    return lambda: ByobNet(cfg, num_classes=CLASSES, img_size=32)


def mixer(**kwargs: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds an MLP-Mixer of one block."""
    return lambda: MlpMixer(img_size=32, patch_size=8, embed_dim=16, num_blocks=1, num_classes=CLASSES, **kwargs)


class MobileNet(nn.Module):
    """A stem and the attention blocks of MobileNetV4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        queries = {"num_heads": 4, "key_dim": 4, "value_dim": 4, "noskip": False}
        self.multi_query = MobileAttention(16, 16, use_multi_query=True, kv_stride=2, **queries)
        self.plain = MobileAttention(16, 16, num_heads=4, use_multi_query=False)
        self.inverted = UniversalInvertedResidual(16, 16, se_layer=SqueezeExcite, exp_ratio=2.0)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, 3, height, width) to (batch, classes)."""
        x = self.inverted(self.plain(self.multi_query(self.stem(x))))
        return self.head(x.mean((2, 3)))


class NextVit(nn.Module):
    """A stem and an attention of NextViT. A whole NextViT cannot be made small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.attn = EfficientAttention(16, head_dim=4, sr_ratio=2, norm_layer=nn.BatchNorm1d)
        self.mlp = Mlp(16, 24)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, 3, height, width) to (batch, classes)."""
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        return self.head((x + self.mlp(x)).mean(1))


class LowFormer(nn.Module):
    """A stem and an attention of LowFormer. Small models of LowFormer fuse the consumer of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 4, 4)
        self.attn = ConvAttention(64, head_dim_mul=1.0, att_stride=2, att_kernel=3)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, 3, height, width) to (batch, classes)."""
        x = self.stem(x)
        return self.head((x + self.attn(x)).mean((2, 3)))


CONV_NEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": CLASSES}

# (a function that builds the model, image size, the adapters that have to give its sites)
Model = tuple[Callable[[], nn.Module], int, tuple[str, ...]]
TIMM_HYBRID_MODELS: dict[str, Model] = {
    "mvitv2": (mvit(), 32, ("timm-mvitv2",)),
    "mvitv2 average pooling": (mvit(mode="avg", use_cls_token=True), 32, ("timm-mvitv2",)),
    "coatnet": (maxxvit("T", head_first=True, rel_pos_type="bias"), 32, ("timm-maxvit",)),
    "coatnet mlp": (maxxvit("T", rel_pos_type="mlp"), 32, ("timm-maxvit",)),
    "maxvit": (maxxvit("M", head_first=True, use_nchw_attn=True), 32, ("timm-maxvit",)),
    "maxvit tf": (maxxvit("M", head_first=False, rel_pos_type="bias_tf"), 32, ("timm-maxvit-tf",)),
    "maxvit parallel": (maxxvit("PM", head_first=True, rel_pos_type="mlp"), 32, ("timm-maxvit",)),
    "maxxvit": (maxxvit("M", MaxxVitConvCfg(block_type="convnext"), head_first=False), 32, ("timm-maxvit-qkv-first",)),
    "levit": (
        tiny("levit_128s", img_size=64, embed_dim=(16, 24), key_dim=4, depth=(1, 1), num_heads=(2, 3)),
        64,
        ("timm-levit", "timm-levit-downsample"),
    ),
    "levit conv": (
        tiny("levit_128s", img_size=64, embed_dim=(16, 24), key_dim=4, depth=(1, 1), num_heads=(2, 3), use_conv=True),
        64,
        ("timm-levit", "timm-levit-downsample"),
    ),
    "coat": (
        tiny("coat_lite_tiny", img_size=64, embed_dims=(16,) * 4, serial_depths=(1,) * 4),
        64,
        (),
    ),
    "edgenext": (
        tiny(
            "edgenext_xx_small",
            depths=(1, 1, 1, 2),
            dims=(8, 16, 16, 24),
            global_block_counts=(0, 0, 0, 1),
            heads=(2, 2, 2, 3),
        ),
        32,
        ("timm-edgenext",),
    ),
    "efficientformer": (
        tiny("efficientformer_l1", img_size=224, depths=(1, 1, 1, 2), embed_dims=(8, 8, 8, 16), num_vit=1),
        224,
        ("timm-efficientformer",),
    ),
    "efficientformerv2": (
        tiny("efficientformerv2_s0", img_size=64, depths=(1, 1, 1, 1), embed_dims=(8, 8, 8, 16), num_vit=1),
        64,
        ("timm-efficientformerv2", "timm-efficientformerv2-downsample"),
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
        ("timm-fastvit",),
    ),
    "focalnet": (
        lambda: FocalNet(depths=(1, 1), embed_dim=16, focal_levels=(2, 2), focal_windows=(3, 3), num_classes=CLASSES),
        32,
        (),
    ),
    "nextvit": (NextVit, 32, ("timm-nextvit",)),
    "pit": (
        tiny("pit_ti_224", img_size=32, patch_size=4, stride=4, base_dims=(8, 8), depth=(1, 1), heads=(2, 4)),
        32,
        ("timm-attention",),
    ),
    "poolformer": (lambda: MetaFormer(**CONV_NEXT, token_mixers=Pooling), 32, ()),
    "caformer": (
        lambda: MetaFormer(
            depths=(1, 1),
            dims=(8, 64),
            token_mixers=[SepConv, Attention],
            norm_layers=[LayerNorm2dNoBias, LayerNormNoBias],
            num_classes=CLASSES,
        ),
        32,
        ("timm-metaformer",),
    ),
    "swiftformer": (tiny("swiftformer_xs", layers=(1, 1, 1, 1), embed_dims=(8, 8, 8, 8)), 32, ()),
    "tinyvit": (
        tiny(
            "tiny_vit_5m_224",
            embed_dims=(8, 16, 24, 24),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 3, 3),
            window_sizes=(2, 2, 2, 1),
        ),
        32,
        ("timm-tinyvit",),
    ),
    "vitamin": (tiny("vitamin_small_224", img_size=32, depth=1), 32, ("timm-attention",)),
    "mixer": (mixer(), 32, ()),
    "gmixer": (mixer(mlp_layer=GluMlp), 32, ("timm-glu",)),
    "gmlp": (mixer(block_layer=SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=4), 32, ("timm-gated-mlp",)),
    "resmlp": (mixer(block_layer=ResBlock, mlp_ratio=4), 32, ()),
    "convnext": (lambda: ConvNeXt(**CONV_NEXT), 32, ()),
    "convnextv2": (lambda: ConvNeXt(**CONV_NEXT, use_grn=True, ls_init_value=None), 32, ("timm-grn-mlp",)),
    "convnextv2 conv mlp": (
        lambda: ConvNeXt(**CONV_NEXT, use_grn=True, ls_init_value=None, conv_mlp=True),
        32,
        ("timm-grn-mlp",),
    ),
    "efficientvit mit": (
        tiny("efficientvit_b0", widths=(8, 8, 8, 16, 16), depths=(1, 1, 1, 1, 1), head_widths=(16, 16)),
        32,
        (),
    ),
    "botnet": (byob("bottleneck"), 32, ("timm-bottleneck",)),
    "mobilenetv4 hybrid": (MobileNet, 32, ("timm-multi-query", "timm-attention2d")),
    "shvit": (tiny("shvit_s1", embed_dim=(16, 16, 16), partial_dim=(8, 8, 8), depth=(1, 1, 1)), 64, ()),
    "lowformer": (LowFormer, 32, ("timm-lowformer",)),
    "iformer": (tiny("iformer_t", dims=(8, 8, 8, 8), depths=(1, 1, 4, 3), attn_groups=(0, 0, 1, 1)), 32, ()),
    "inception next": (tiny("inception_next_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), 32, ()),
}
