"""timm's ViT-like attentions, an entry for each class. Names are timm's; `Units` says what each field means.

Left alone: the parameter-free `AttentionPoolPrr`, whose heads are parts of the stream itself.
"""

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Features, Forwards, Stream

# Classes are named, not imported: importing timm takes longer than everything else in this package.
VIT = "xprune.adapters.timm.vit_forwards:"
PYRAMID = "xprune.adapters.timm.pyramid_forwards:"
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
        also=Also(layers=("gate",), norm="norm", counts=("num_heads", "attn_dim", "kv_dim")),
        forwards=Forwards(built="built", pruned=VIT + "PrunedAttentionRope"),
    ),
    Units(
        "timm-diff",
        ("timm.layers.diff_attention.DiffAttention",),
        QKV,
        also=Also(norm="norm"),
        forwards=Forwards(pruned=VIT + "PrunedDiffAttention"),
    ),
    Units(
        "timm-eva",
        ("timm.models.eva.EvaAttention",),
        (*QKV, *APART),
        also=Also(tensors=BIASES, layers=("gate",), norm="norm"),
        forwards=Forwards(built="built", pruned=VIT + "PrunedEvaAttention"),
    ),
    Units(
        "timm-beit",
        ("timm.models.beit.Attention",),
        QKV,
        also=Also(tensors=(*BIASES, ("relative_position_bias_table", 1))),
        forwards=Forwards(built="built", pruned=VIT + "PrunedBeitAttention"),
    ),
    Units(
        "timm-relpos",
        ("timm.models.vision_transformer_relpos.RelPosAttention",),
        QKV,
        also=Also(
            tensors=(
                ("rel_pos.relative_position_bias_table", 1),
                ("rel_pos.mlp.fc2.weight", 0),
                ("rel_pos.mlp.fc2.bias", 0),
            ),
            counts=("rel_pos.num_heads", "rel_pos.bias_shape.2"),
        ),
        forwards=Forwards(built="built", pruned=VIT + "PrunedRelPosAttention"),
    ),
    Units(
        "timm-sam",
        ("timm.models.vision_transformer_sam.Attention",),
        QKV,
    ),
    Units(
        "timm-gemma4",  # as for timm-rope
        ("timm.models.gemma4_vit.Gemma4Attention",),
        tuple((f"{name}.linear", groups) for name, groups in APART),
        writer="o_proj.linear",
        count="num_kv_heads",
        also=Also(counts=("num_heads",)),
    ),
    Units(
        "timm-class-attention",
        ("timm.models.cait.ClassAttn",),
        (("q", 1), ("k", 1), ("v", 1)),
        forwards=Forwards(pruned=VIT + "PrunedClassAttn", removed=VIT + "RemovedClassAttention"),
    ),
    Units(
        "timm-xcit",
        ("timm.models.xcit.XCA",),
        QKV,
        also=Also(tensors=(("temperature", 0),)),
        forwards=Forwards(pruned=VIT + "PrunedXCA"),
    ),
    Units(
        "timm-crossvit",
        ("timm.models.crossvit.CrossAttention",),
        (("wq", 1), ("wk", 1), ("wv", 1)),
        forwards=Forwards(pruned=VIT + "PrunedCrossAttention", removed=VIT + "RemovedClassAttention"),
    ),
    Units(
        "timm-convit",
        ("timm.models.convit.MHSA",),
        QKV,
        forwards=Forwards(pruned=VIT + "PrunedMHSA"),
    ),
    Units(
        "timm-convit-gpsa",
        ("timm.models.convit.GPSA",),
        (("qk", 2), ("v", 1)),
        also=Also(tensors=(("pos_proj.weight", 0), ("pos_proj.bias", 0), ("gating_param", 0))),
        forwards=Forwards(pruned=VIT + "PrunedGPSA"),
    ),
    Units(
        "timm-tnt",
        ("timm.models.tnt.Attention",),
        (("qk", 2), ("v", 1)),
        also=Also(counts=("hidden_dim",)),
    ),
    Units(
        "timm-volo",
        ("timm.models.volo.Attention",),
        QKV,
        forwards=Forwards(pruned=PYRAMID + "PrunedVoloAttention"),
    ),
    Units(
        "timm-volo-outlook",
        ("timm.models.volo.OutlookAttention",),
        (("v", 1), ("attn", 1)),
        forwards=Forwards(pruned=PYRAMID + "PrunedOutlookAttention"),
    ),
    Units(
        "timm-volo-class",
        ("timm.models.volo.ClassAttention",),
        (("q", 1), ("kv", 2)),
        forwards=Forwards(removed=VIT + "RemovedClassAttention"),
    ),
    Units(
        "timm-pvt",
        ("timm.models.pvt_v2.Attention",),
        (("q", 1), ("kv", 2)),
        forwards=Forwards(pruned=PYRAMID + "PrunedPvtAttention"),
        stream=Stream(tensors=REDUCTION),
    ),
    Units(
        "timm-twins-global",
        ("timm.models.twins.GlobalSubSampleAttn",),
        (("q", 1), ("kv", 2)),
        forwards=Forwards(pruned=PYRAMID + "PrunedGlobalSubSampleAttn"),
        stream=Stream(tensors=REDUCTION),
    ),
    Units(
        "timm-twins-local",
        ("timm.models.twins.LocallyGroupedAttn",),
        QKV,
        forwards=Forwards(pruned=PYRAMID + "PrunedLocallyGroupedAttn"),
    ),
    Units(
        "timm-nest",
        ("timm.models.nest.Attention",),
        QKV,
        features=Features(layout="width-major"),
        forwards=Forwards(pruned=PYRAMID + "PrunedNestAttention"),
    ),
    Units(
        "timm-visformer",
        ("timm.models.visformer.Attention",),
        QKV,
    ),
    Units(
        "timm-visformer-mlp",  # a unit is a group of the grouped convolution, where there is one
        ("timm.models.visformer.SpatialMlp",),
        (("conv1", 1), ("conv2", 1)),
        writer="conv3",
        count="conv2.groups",
        kind="neuron",
        also=Also(counts=("group", "hidden_features")),
    ),
    Units(
        "timm-hiera",
        ("timm.models.hiera.MaskUnitAttention",),
        QKV,
        count="heads",
        also=Also(counts=("dim_out",)),
        forwards=Forwards(removed=PYRAMID + "RemovedHieraAttention"),
    ),
    Units(
        "timm-hieradet",
        ("timm.models.hieradet_sam2.MultiScaleAttention",),
        QKV,
        forwards=Forwards(removed=PYRAMID + "RemovedHieraDetAttention"),
    ),
    Units(
        "timm-swinv2-cr",
        ("timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",),
        QKV,
        also=Also(tensors=(("logit_scale", 0), ("meta_mlp.fc2.weight", 0), ("meta_mlp.fc2.bias", 0))),
        forwards=Forwards(pruned=PYRAMID + "PrunedWindowAttentionCr"),
    ),
    Units(
        "timm-gcvit",  # queries of every other block come from outside: then qkv makes keys and values only
        ("timm.models.gcvit.WindowAttentionGlobal",),
        (("qkv", 0),),
        also=Also(tensors=(("rel_pos.relative_position_bias_table", 1),), counts=("rel_pos.bias_shape.2",)),
        forwards=Forwards(built="built", pruned=PYRAMID + "PrunedWindowAttentionGlobal"),
    ),
    Units(
        "timm-davit",
        ("timm.models.davit.WindowAttention",),
        QKV,
        forwards=Forwards(pruned=PYRAMID + "PrunedDavitWindowAttention"),
    ),
    Units(
        "timm-davit-channel",
        ("timm.models.davit.ChannelAttention",),
        QKV,
        forwards=Forwards(pruned=PYRAMID + "PrunedChannelAttention"),
    ),
    Units(
        "timm-davit-channel-v2",
        ("timm.models.davit.ChannelAttentionV2",),
        QKV,
        count="groups",
        forwards=Forwards(pruned=PYRAMID + "PrunedChannelAttentionV2"),
    ),
)
