"""timm's ViT-like attentions, an entry for each class. Names are timm's; `Units` says what each field means.

Left alone: the parameter-free `AttentionPoolPrr`, whose heads are parts of the stream itself.
"""

from xprune.adapters.declarative import Units
from xprune.adapters.timm import pyramid_forwards as pyramid
from xprune.adapters.timm import vit_forwards as forwards

QKV = (("qkv", 3),)
APART = (("q_proj", 1), ("k_proj", 1), ("v_proj", 1))
REDUCTION = (("sr.weight", 0), ("sr.weight", 1), ("sr.bias", 0), ("norm.weight", 0), ("norm.bias", 0))
BIASES = (("q_bias", 0), ("k_bias", 0), ("v_bias", 0))  # k_bias is a buffer of zeros

TIMM_VIT = (
    Units(
        "timm-rope",  # a unit is a head of keys and values with all the queries that share it
        ("timm.layers.attention.AttentionRope",),
        (*QKV, *APART),
        count="num_kv_heads",
        layers=("gate",),
        norm="norm",
        counts=("num_heads", "attn_dim", "kv_dim"),
        index="built",
        pruned=forwards.PrunedAttentionRope,
    ),
    Units(
        "timm-diff",
        ("timm.layers.diff_attention.DiffAttention",),
        QKV,
        norm="norm",
        pruned=forwards.PrunedDiffAttention,
    ),
    Units(
        "timm-eva",
        ("timm.models.eva.EvaAttention",),
        (*QKV, *APART),
        tensors=BIASES,
        layers=("gate",),
        norm="norm",
        index="built",
        pruned=forwards.PrunedEvaAttention,
    ),
    Units(
        "timm-beit",
        ("timm.models.beit.Attention",),
        QKV,
        tensors=(*BIASES, ("relative_position_bias_table", 1)),
        index="built",
        pruned=forwards.PrunedBeitAttention,
    ),
    Units(
        "timm-relpos",
        ("timm.models.vision_transformer_relpos.RelPosAttention",),
        QKV,
        tensors=(
            ("rel_pos.relative_position_bias_table", 1),
            ("rel_pos.mlp.fc2.weight", 0),
            ("rel_pos.mlp.fc2.bias", 0),
        ),
        counts=("rel_pos.num_heads", "rel_pos.bias_shape.2"),
        index="built",
        pruned=forwards.PrunedRelPosAttention,
    ),
    Units("timm-sam", ("timm.models.vision_transformer_sam.Attention",), QKV),
    Units(
        "timm-gemma4",  # as for timm-rope
        ("timm.models.gemma4_vit.Gemma4Attention",),
        tuple((f"{name}.linear", groups) for name, groups in APART),
        writer="o_proj.linear",
        count="num_kv_heads",
        counts=("num_heads",),
    ),
    Units(
        "timm-class-attention",
        ("timm.models.cait.ClassAttn",),
        (("q", 1), ("k", 1), ("v", 1)),
        pruned=forwards.PrunedClassAttn,
        removed=forwards.RemovedClassAttention,
    ),
    Units(
        "timm-xcit",
        ("timm.models.xcit.XCA",),
        QKV,
        tensors=(("temperature", 0),),
        pruned=forwards.PrunedXCA,
    ),
    Units(
        "timm-crossvit",
        ("timm.models.crossvit.CrossAttention",),
        (("wq", 1), ("wk", 1), ("wv", 1)),
        pruned=forwards.PrunedCrossAttention,
        removed=forwards.RemovedClassAttention,
    ),
    Units("timm-convit", ("timm.models.convit.MHSA",), QKV, pruned=forwards.PrunedMHSA),
    Units(
        "timm-convit-gpsa",
        ("timm.models.convit.GPSA",),
        (("qk", 2), ("v", 1)),
        tensors=(("pos_proj.weight", 0), ("pos_proj.bias", 0), ("gating_param", 0)),
        pruned=forwards.PrunedGPSA,
    ),
    Units("timm-tnt", ("timm.models.tnt.Attention",), (("qk", 2), ("v", 1)), counts=("hidden_dim",)),
    Units("timm-volo", ("timm.models.volo.Attention",), QKV, pruned=pyramid.PrunedVoloAttention),
    Units(
        "timm-volo-outlook",
        ("timm.models.volo.OutlookAttention",),
        (("v", 1), ("attn", 1)),
        pruned=pyramid.PrunedOutlookAttention,
    ),
    Units(
        "timm-volo-class",
        ("timm.models.volo.ClassAttention",),
        (("q", 1), ("kv", 2)),
        removed=forwards.RemovedClassAttention,
    ),
    Units(
        "timm-pvt",
        ("timm.models.pvt_v2.Attention",),
        (("q", 1), ("kv", 2)),
        stream=REDUCTION,
        pruned=pyramid.PrunedPvtAttention,
    ),
    Units(
        "timm-twins-global",
        ("timm.models.twins.GlobalSubSampleAttn",),
        (("q", 1), ("kv", 2)),
        stream=REDUCTION,
        pruned=pyramid.PrunedGlobalSubSampleAttn,
    ),
    Units(
        "timm-twins-local",
        ("timm.models.twins.LocallyGroupedAttn",),
        QKV,
        pruned=pyramid.PrunedLocallyGroupedAttn,
    ),
    Units(
        "timm-nest",
        ("timm.models.nest.Attention",),
        QKV,
        layout="width-major",
        pruned=pyramid.PrunedNestAttention,
    ),
    Units("timm-visformer", ("timm.models.visformer.Attention",), QKV),
    Units(
        "timm-visformer-mlp",  # a unit is a group of the grouped convolution, where there is one
        ("timm.models.visformer.SpatialMlp",),
        (("conv1", 1), ("conv2", 1)),
        writer="conv3",
        count="conv2.groups",
        counts=("group", "hidden_features"),
        kind="neuron",
    ),
    Units(
        "timm-hiera",
        ("timm.models.hiera.MaskUnitAttention",),
        QKV,
        count="heads",
        counts=("dim_out",),
        removed=pyramid.RemovedHieraAttention,
    ),
    Units(
        "timm-hieradet",
        ("timm.models.hieradet_sam2.MultiScaleAttention",),
        QKV,
        removed=pyramid.RemovedHieraDetAttention,
    ),
    Units(
        "timm-swinv2-cr",
        ("timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",),
        QKV,
        tensors=(("logit_scale", 0), ("meta_mlp.fc2.weight", 0), ("meta_mlp.fc2.bias", 0)),
        pruned=pyramid.PrunedWindowAttentionCr,
    ),
    Units(
        "timm-gcvit",  # queries of every other block come from outside: then qkv makes keys and values only
        ("timm.models.gcvit.WindowAttentionGlobal",),
        (("qkv", 0),),
        tensors=(("rel_pos.relative_position_bias_table", 1),),
        counts=("rel_pos.bias_shape.2",),
        index="built",
        pruned=pyramid.PrunedWindowAttentionGlobal,
    ),
    Units("timm-davit", ("timm.models.davit.WindowAttention",), QKV, pruned=pyramid.PrunedDavitWindowAttention),
    Units("timm-davit-channel", ("timm.models.davit.ChannelAttention",), QKV, pruned=pyramid.PrunedChannelAttention),
    Units(
        "timm-davit-channel-v2",
        ("timm.models.davit.ChannelAttentionV2",),
        QKV,
        count="groups",
        pruned=pyramid.PrunedChannelAttentionV2,
    ),
)
