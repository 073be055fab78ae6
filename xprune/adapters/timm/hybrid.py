"""The adapters of timm's families that combine convolutions and attention: an entry for each class.

Only classes whose units the dependency graph cannot find have an entry. The heads of these attentions cannot be removed
one by one, so they have none:

- attentions with a single head: SHViT, iFormer, MobileViTv2, SwiftFormer
- attentions where a head reads the output of another head: EfficientViT-MSRA
- keys and values for all heads in the same layer as the heads' queries: LambdaNet
- convolutions for the relative position that several blocks share: CoaT
- convolutions with a group for each head on the residual stream itself: ConvAttention of NextViT
- MViTv2 with its pooling before the projections

The graph finds the neurons of their MLPs.
"""

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Forwards, Scope, Stream

# Classes are given as strings, not imported. Importing timm takes longer than importing the rest of this package.
HYBRID = "xprune.adapters.timm.hybrid_forwards:"
QKV = (("qkv", 3),)  # rows: queries of all heads, then keys of all heads, then values of all heads
HEADS_FIRST = (("qkv", 1),)  # the rows of a head are together: its queries, its keys, its values
MAXXVIT = ("timm.models.maxxvit.Attention2d", "timm.models.maxxvit.AttentionCl")
# timm's relative position bias stores the shape to which it reshapes: (targets, sources, heads), or, in the models from
# TensorFlow, (heads, height, width).
BIAS = ("rel_pos.num_heads", "rel_pos.bias_shape.2")
BIAS_TF = ("rel_pos.num_heads", "rel_pos.bias_shape.0")
TABLE = "rel_pos.relative_position_bias_table"
LEVIT = (("attention_biases", 0),)  # (heads, positions)
LEVIT_ATTRIBUTES = ("key_attn_dim", "val_attn_dim")
CACHE = ("attention_bias_cache",)  # in eval mode, the biases of all heads by device
# The bias is a table, or an MLP whose last layer has a row for each head.
MLP_BIAS = ((TABLE, 1), ("rel_pos.mlp.fc2.weight", 0), ("rel_pos.mlp.fc2.bias", 0))

TIMM_HYBRID = (
    Units(
        # The pooling convolutions and their norms run over the features of one head, and all heads share them. With
        # `unshared` they do not. The attention returns a tuple with the size of the map, so one head has to stay.
        "timm-mvitv2",
        ("timm.models.mvitv2.MultiScaleAttention",),
        QKV,
        also=Also(attributes=("dim_out",)),
        scope=Scope(unless="unshared", whole=False),
    ),
    # Three orders of one class. The first entry that fits is taken, so the one without `needs` comes last.
    Units(
        "timm-maxvit-tf",
        MAXXVIT,
        QKV,
        also=Also(tensors=((TABLE, 0),), attributes=BIAS_TF),
        scope=Scope(needs=("rel_pos.height_lookup",)),  # only the bias of the models from TensorFlow has it
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
        "timm-multi-query",  # one key and one value for all heads: they stay, and a head is its query
        ("timm.layers.attention2d.MultiQueryAttention2d",),
        (("query.proj", 1),),
        consumer="output.proj",
    ),
    Units(
        "timm-levit",
        ("timm.models.levit.Attention",),
        (("qkv.linear", 1),),  # rows of a head are together
        consumer="proj.ln.linear",
        also=Also(layers=("qkv.bn",), tensors=LEVIT, attributes=LEVIT_ATTRIBUTES, caches=CACHE),
        stream=Stream(after=("proj.ln.bn",)),
        scope=Scope(
            whole=False,  # a batch norm follows the consumer, so its bias is not the output
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
        # Talking heads: the first mix reads the scores of all heads, so all queries, keys and biases stay. A removed
        # head loses its values and its row of the second mix.
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
        also=Also(tensors=(("temperature", 0),)),  # (heads, 1, 1)
        forwards=Forwards(pruned=HYBRID + "PrunedCrossCovarianceAttn"),
    ),
    Units(
        "timm-fastvit",
        ("timm.models.fastvit.Attention",),
        QKV,
        forwards=Forwards(pruned=HYBRID + "PrunedFastVitAttention"),
        # The module reads a map, with channels on axis 1, but `qkv` is a linear layer, with channels on the last axis.
        # `qkv` is a producer already. Because it is named here, channels are gated at its input.
        stream=Stream(tensors=(("qkv.weight", 1),)),
        scope=Scope(whole=False),  # `Removed` would put the bias of a linear layer on the last axis of the map
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
        # An upsampling follows the output projection. Some models have no such projection: `o_proj` is an nn.Identity,
        # the upsampling reads the heads, and the heads stay.
        "timm-lowformer",
        ("timm.models.lowformer.ConvAttention", "timm.models.cpubone.ConvAttention"),
        (("pwise", 1),),  # rows of a head are together
        consumer="o_proj",
        also=Also(attributes=("o_proj_inpdim",)),
        scope=Scope(whole=False),
    ),
    Units(
        # The attention has no output projection: the block's last convolution reads the heads. So the entry describes
        # the block. `post_attn` is a batch norm over the heads' features.
        "timm-bottleneck",
        ("timm.models.byobnet.SelfAttnBlock",),
        (("self_attn.qkv", 3),),
        consumer="conv3_1x1.conv",
        count="self_attn.num_heads",
        also=Also(layers=("post_attn",), attributes=("self_attn.dim_out_qk", "self_attn.dim_out_v")),
        scope=Scope(whole=False),
    ),
    Units(
        # gMLP. A neuron is a pair of a value and a gate: a row in each half of fc1. A norm runs over the gates, then a
        # linear layer `gate.proj` mixes the tokens. Other gated MLPs have no such layer.
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
        "timm-grn-mlp",  # ConvNeXt v2: a global response norm runs over the neurons
        ("timm.layers.mlp.GlobalResponseNormMlp",),
        (("fc1", 1),),
        consumer="fc2",
        count="",
        kind="neuron",
        also=Also(norm="grn"),
    ),
)
