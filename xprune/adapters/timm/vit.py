"""The adapters for the attentions of timm's other transformers, one for each class. `Units` explains the fields.

`AttentionPoolPrr` has no adapter. It has no parameters, because its heads are parts of the residual stream.
"""

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Features, Forwards, Stream

# The classes are given as strings and imported when they are needed, because the import of timm takes longer than the
# import of all of xprune.
VIT = "xprune.adapters.timm.vit_forwards:"
PYRAMID = "xprune.adapters.timm.pyramid_forwards:"
# Order of the rows of qkv: the queries of all heads, then the keys of all heads, then the values of all heads.
QKV = (("qkv", 3),)
APART = (("q_proj", 1), ("k_proj", 1), ("v_proj", 1))
# Keys and values come from a smaller feature map. A strided convolution `sr` and a norm layer make this feature map.
# Input and output of `sr` have the channels of the residual stream, so the weight of `sr` shrinks along both axes.
REDUCTION = (("sr.weight", 0), ("sr.weight", 1), ("sr.bias", 0), ("norm.weight", 0), ("norm.bias", 0))
BIASES = (("q_bias", 0), ("k_bias", 0), ("v_bias", 0))  # k_bias is a buffer of zeros

TIMM_VIT = (
    Units(
        "timm-rope",  # a unit is one head of keys and values plus all query heads that share it
        ("timm.layers.attention.AttentionRope",),
        (*QKV, *APART),  # a module has either the fused layer or the three separate layers
        count="num_kv_heads",
        # num_heads is the number of query heads, which is a multiple of num_kv_heads.
        also=Also(layers=("gate",), norm="norm", attributes=("num_heads", "attn_dim", "kv_dim")),
        forwards=Forwards(built="built", pruned=VIT + "PrunedAttentionRope"),
    ),
    Units(
        "timm-diff",  # a head has two queries, two keys, and one value that is twice as long
        ("timm.layers.diff_attention.DiffAttention",),
        QKV,
        also=Also(norm="norm"),
        forwards=Forwards(pruned=VIT + "PrunedDiffAttention"),
    ),
    Units(
        "timm-eva",
        ("timm.models.eva.EvaAttention",),
        (*QKV, *APART),
        # If there is a fused layer, the biases are parameters of the attention and not of the layer.
        also=Also(tensors=BIASES, layers=("gate",), norm="norm"),
        forwards=Forwards(built="built", pruned=VIT + "PrunedEvaAttention"),
    ),
    Units(
        "timm-beit",
        ("timm.models.beit.Attention",),
        QKV,
        also=Also(tensors=(*BIASES, ("relative_position_bias_table", 1))),  # the table has the shape (positions, heads)
        forwards=Forwards(built="built", pruned=VIT + "PrunedBeitAttention"),
    ),
    Units(
        "timm-relpos",
        ("timm.models.vision_transformer_relpos.RelPosAttention",),
        QKV,
        also=Also(
            # The position bias comes from a table (positions, heads), or from an MLP whose last layer has a row for
            # each head.
            tensors=(
                ("rel_pos.relative_position_bias_table", 1),
                ("rel_pos.mlp.fc2.weight", 0),
                ("rel_pos.mlp.fc2.bias", 0),
            ),
            attributes=("rel_pos.num_heads", "rel_pos.bias_shape.2"),  # bias_shape is (targets, sources, heads)
        ),
        forwards=Forwards(built="built", pruned=VIT + "PrunedRelPosAttention"),
    ),
    Units(
        "timm-sam",
        ("timm.models.vision_transformer_sam.Attention",),
        QKV,
    ),
    Units(
        "timm-gemma4",  # as in timm-rope, a unit is one head of keys and values plus its query heads
        ("timm.models.gemma4_vit.Gemma4Attention",),
        # Each projection is a module that contains a linear layer.
        tuple((f"{name}.linear", groups) for name, groups in APART),
        consumer="o_proj.linear",
        count="num_kv_heads",
        also=Also(attributes=("num_heads",)),
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
        also=Also(tensors=(("temperature", 0),)),  # its shape is (heads, 1, 1)
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
        # pos_proj makes the position scores of each head. gating_param weighs content against position for each head.
        also=Also(tensors=(("pos_proj.weight", 0), ("pos_proj.bias", 0), ("gating_param", 0))),
        forwards=Forwards(pruned=VIT + "PrunedGPSA"),
    ),
    Units(
        "timm-tnt",
        ("timm.models.tnt.Attention",),
        (("qk", 2), ("v", 1)),
        also=Also(attributes=("hidden_dim",)),
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
        (("v", 1), ("attn", 1)),  # the rows of `attn` make the attention map of each head
        forwards=Forwards(pruned=PYRAMID + "PrunedOutlookAttention"),
    ),
    Units(
        "timm-volo-class",
        ("timm.models.volo.ClassAttention",),
        (("q", 1), ("kv", 2)),  # order of the rows of kv: the keys of all heads, then the values of all heads
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
        # timm concatenates the heads feature by feature: feature 0 of all heads, then feature 1 of all heads, and so
        # on.
        features=Features(layout="width-major"),
        forwards=Forwards(pruned=PYRAMID + "PrunedNestAttention"),
    ),
    Units(
        "timm-visformer",
        ("timm.models.visformer.Attention",),
        QKV,
    ),
    Units(
        # A unit is a group of neurons: a group of the convolution between the first and the last layer. A module
        # without this convolution has no attribute `conv2.groups`. Then the adapter does not fit, and xprune finds the
        # neurons in the graph.
        "timm-visformer-mlp",
        ("timm.models.visformer.SpatialMlp",),
        (("conv1", 1), ("conv2", 1)),
        consumer="conv3",
        count="conv2.groups",
        kind="neuron",
        also=Also(attributes=("group", "hidden_features")),
    ),
    Units(
        "timm-hiera",
        ("timm.models.hiera.MaskUnitAttention",),
        QKV,
        count="heads",
        also=Also(attributes=("dim_out",)),  # timm reshapes the concatenated heads to this size
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
        "timm-gcvit",
        ("timm.models.gcvit.WindowAttentionGlobal",),
        # Every second block gets its queries from the model. Its `qkv` makes only keys and values: 2 groups instead of
        # 3.
        (("qkv", 0),),
        also=Also(tensors=(("rel_pos.relative_position_bias_table", 1),), attributes=("rel_pos.bias_shape.2",)),
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
