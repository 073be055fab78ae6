"""The adapters for timm's models that combine convolutions and attention. `Units` explains the fields.

There is an adapter only for classes whose units xprune cannot find in the dependency graph. The graph finds the neurons
of the MLPs. There is no adapter for these attentions, because their heads cannot be removed one by one:

- SHViT, iFormer, MobileViTv2 and SwiftFormer: their attentions have a single head.
- EfficientViT-MSRA: a head reads the output of another head.
- LambdaNet: one layer makes the queries of each head, and also the keys and values that all heads share.
- CoaT: several blocks share the convolutions for the relative position.
- ConvAttention of NextViT: a convolution on the residual stream has a group for each head.
- MViTv2 if its pooling comes before the projections.
"""

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Forwards, Scope, Stream

# The classes are given as strings and imported when they are needed. Importing timm takes longer than importing the
# rest of this package.
HYBRID = "xprune.adapters.timm.hybrid_forwards:"
# Order of the rows of qkv: the queries of all heads, then the keys of all heads, then the values of all heads.
QKV = (("qkv", 3),)
# Order of the rows of qkv: queries, keys and values of head 0, then those of head 1, and so on.
HEADS_FIRST = (("qkv", 1),)
MAXXVIT = ("timm.models.maxxvit.Attention2d", "timm.models.maxxvit.AttentionCl")
# The relative position bias of timm stores a shape, to which it reshapes. The shape is (targets, sources, heads). In
# models whose weights come from TensorFlow, it is (heads, height, width).
BIAS = ("rel_pos.num_heads", "rel_pos.bias_shape.2")
BIAS_TF = ("rel_pos.num_heads", "rel_pos.bias_shape.0")
TABLE = "rel_pos.relative_position_bias_table"
LEVIT = (("attention_biases", 0),)  # (heads, positions)
LEVIT_ATTRIBUTES = ("key_attn_dim", "val_attn_dim")
CACHE = ("attention_bias_cache",)  # in eval mode, this dict holds the biases of all heads for each device
# The position bias comes from a table, or from an MLP whose last layer has a row for each head.
MLP_BIAS = ((TABLE, 1), ("rel_pos.mlp.fc2.weight", 0), ("rel_pos.mlp.fc2.bias", 0))

TIMM_HYBRID = (
    Units(
        # The pooling convolutions and their norms process the features of one head, and all heads share them. If
        # `unshared` is True, each head has separate ones. The attention also returns the size of the feature map, so
        # one head has to stay.
        "timm-mvitv2",
        ("timm.models.mvitv2.MultiScaleAttention",),
        QKV,
        also=Also(attributes=("dim_out",)),
        scope=Scope(unless="unshared", whole=False),
    ),
    # Three adapters for the same classes, whose tensors have one of three orders. The first adapter that fits is used,
    # so the adapter without `needs` comes last.
    Units(
        "timm-maxvit-tf",
        MAXXVIT,
        QKV,
        also=Also(tensors=((TABLE, 0),), attributes=BIAS_TF),
        scope=Scope(needs=("rel_pos.height_lookup",)),  # only models whose weights come from TensorFlow have it
    ),
    Units(
        "timm-maxvit",
        MAXXVIT,
        HEADS_FIRST,
        also=Also(tensors=MLP_BIAS, attributes=BIAS),
        scope=Scope(needs=("head_first",)),
    ),
    Units(
        "timm-maxvit-qkv-first",
        MAXXVIT,
        QKV,
        also=Also(tensors=MLP_BIAS, attributes=BIAS),
    ),
    Units(
        "timm-attention2d",
        ("timm.layers.attention2d.Attention2d",),
        QKV,
        scope=Scope(unless="head_first"),
    ),
    Units(
        "timm-multi-query",  # all heads share one key and one value, which stay. A unit is the query of one head
        ("timm.layers.attention2d.MultiQueryAttention2d",),
        (("query.proj", 1),),
        consumer="output.proj",
    ),
    Units(
        "timm-levit",
        ("timm.models.levit.Attention",),
        (("qkv.linear", 1),),  # all rows of one head are next to each other
        consumer="proj.ln.linear",
        also=Also(layers=("qkv.bn",), tensors=LEVIT, attributes=LEVIT_ATTRIBUTES, caches=CACHE),
        stream=Stream(after=("proj.ln.bn",)),
        scope=Scope(
            whole=False,  # a batch norm follows the consumer, so the output without heads is not the bias
        ),
    ),
    Units(
        "timm-levit-downsample",
        ("timm.models.levit.AttentionDownsample",),
        (("kv.linear", 1), ("q.ln.linear", 1)),
        consumer="proj.ln.linear",
        also=Also(layers=("kv.bn", "q.ln.bn"), tensors=LEVIT, attributes=LEVIT_ATTRIBUTES, caches=CACHE),
        stream=Stream(after=("proj.ln.bn",)),
        scope=Scope(whole=False),
    ),
    Units(
        "timm-efficientformer",
        ("timm.models.efficientformer.Attention",),
        HEADS_FIRST,
        also=Also(tensors=LEVIT, attributes=LEVIT_ATTRIBUTES, caches=CACHE),
    ),
    Units(
        # Talking heads: a first layer mixes the scores of all heads, so all queries, keys and biases stay. When a head
        # is removed, its values and its row of the second mixing layer are removed.
        "timm-efficientformerv2",
        ("timm.models.efficientformer_v2.Attention2d",),
        (("v.conv", 1),),
        consumer="proj.conv",
        also=Also(layers=("v.bn", "v_local.conv", "v_local.bn", "talking_head2"), attributes=("dh",), caches=CACHE),
        forwards=Forwards(pruned=HYBRID + "PrunedTalkingAttention2d"),
        stream=Stream(after=("proj.bn",)),
        scope=Scope(whole=False),
    ),
    Units(
        "timm-efficientformerv2-downsample",
        ("timm.models.efficientformer_v2.Attention2dDownsample",),
        (("q.proj.conv", 1), ("k.conv", 1), ("v.conv", 1)),
        consumer="proj.conv",
        also=Also(
            layers=("q.proj.bn", "k.bn", "v.bn", "v_local.conv", "v_local.bn"),
            tensors=LEVIT,
            attributes=("dh",),
            caches=CACHE,
        ),
        stream=Stream(after=("proj.bn",)),
        scope=Scope(whole=False),
    ),
    Units(
        "timm-tinyvit",
        ("timm.models.tiny_vit.Attention",),
        HEADS_FIRST,
        also=Also(tensors=LEVIT, attributes=("out_dim",), caches=CACHE),
    ),
    Units(
        "timm-edgenext",
        ("timm.models.edgenext.CrossCovarianceAttn",),
        QKV,
        also=Also(tensors=(("temperature", 0),)),  # its shape is (heads, 1, 1)
        forwards=Forwards(pruned=HYBRID + "PrunedCrossCovarianceAttn"),
    ),
    Units(
        "timm-fastvit",
        ("timm.models.fastvit.Attention",),
        QKV,
        forwards=Forwards(pruned=HYBRID + "PrunedFastVitAttention"),
        # The input of the module is a feature map with channels on axis 1. The input of the linear layer `qkv` has the
        # channels on the last axis. Although `qkv` is a producer, it is named here too, so that gates on channels act
        # on its input.
        stream=Stream(tensors=(("qkv.weight", 1),)),
        scope=Scope(whole=False),  # `Removed` would put the bias of a linear layer on the last axis of the feature map
    ),
    Units(
        "timm-nextvit",
        ("timm.models.nextvit.EfficientAttention",),
        (("q", 1), ("k", 1), ("v", 1)),
        forwards=Forwards(pruned=HYBRID + "PrunedNextVitAttention"),
    ),
    Units(
        "timm-metaformer",
        ("timm.models.metaformer.Attention",),
        QKV,
        also=Also(attributes=("attention_dim",)),
        forwards=Forwards(pruned=HYBRID + "PrunedConvFormerAttention"),
    ),
    Units(
        # An upsampling follows the output projection. In some models, `o_proj` is an nn.Identity, and the upsampling
        # reads the heads. Then the adapter does not fit, and all heads stay.
        "timm-lowformer",
        ("timm.models.lowformer.ConvAttention", "timm.models.cpubone.ConvAttention"),
        (("pwise", 1),),  # all rows of one head are next to each other
        consumer="o_proj",
        also=Also(attributes=("o_proj_inpdim",)),
        scope=Scope(whole=False),
    ),
    Units(
        # The attention has no output projection. The last convolution of the block reads the heads, so the adapter
        # describes the block. `post_attn` is a batch norm over the features of the heads.
        "timm-bottleneck",
        ("timm.models.byobnet.SelfAttnBlock",),
        (("self_attn.qkv", 3),),
        consumer="conv3_1x1.conv",
        count="self_attn.num_heads",
        also=Also(layers=("post_attn",), attributes=("self_attn.dim_out_qk", "self_attn.dim_out_v")),
        scope=Scope(whole=False),
    ),
    Units(
        # gMLP. A unit is a value and its gate: one row in each half of fc1. A norm layer computes its mean and variance
        # over the gates, and then a linear layer `gate.proj` mixes the tokens. Other gated MLPs have no layer
        # `gate.proj`.
        "timm-gated-mlp",
        ("timm.layers.mlp.GatedMlp",),
        (("fc1", 2),),
        consumer="fc2",
        count="",
        kind="neuron",
        also=Also(norm="gate.norm"),
        scope=Scope(needs=("gate.proj",)),
    ),
    Units(
        "timm-grn-mlp",  # ConvNeXt v2, where a global response norm reads all neurons
        ("timm.layers.mlp.GlobalResponseNormMlp",),
        (("fc1", 1),),
        consumer="fc2",
        count="",
        kind="neuron",
        also=Also(norm="grn"),
    ),
)
