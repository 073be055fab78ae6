"""timm's convolutional-hybrid families: an entry for each attention or MLP class whose units the graph cannot see.

Left without heads, since no head stands alone there: single-head attentions (SHViT, iFormer, MobileViTv2, SwiftFormer),
heads that feed each other (EfficientViT-MSRA), keys and values inside the heads' fused rows (LambdaNet), relative
position convolutions that several blocks share (CoaT), convolutions by heads on the stream itself (NextViT's
ConvAttention), and MViTv2's pooling before its projections. Their MLPs are found by the graph.
"""

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Forwards, Scope, Stream

# Classes are named, not imported, as in vit.py.
HYBRID = "xprune.adapters.timm.hybrid_forwards:"
QKV = (("qkv", 3),)
HEADS_FIRST = (("qkv", 1),)  # rows of a head are together: its q, its k, its v
MAXXVIT = ("timm.models.maxxvit.Attention2d", "timm.models.maxxvit.AttentionCl")
BIAS = ("rel_pos.num_heads", "rel_pos.bias_shape.2")
BIAS_TF = ("rel_pos.num_heads", "rel_pos.bias_shape.0")
TABLE = "rel_pos.relative_position_bias_table"
LEVIT = (("attention_biases", 0),)
LEVIT_COUNTS = ("key_attn_dim", "val_attn_dim")
CACHE = ("attention_bias_cache",)
MLP_BIAS = ((TABLE, 1), ("rel_pos.mlp.fc2.weight", 0), ("rel_pos.mlp.fc2.bias", 0))

TIMM_HYBRID = (
    Units(
        "timm-mvitv2",  # pools and their norms run over one head's width and are shared by all heads
        ("timm.models.mvitv2.MultiScaleAttention",),
        QKV,
        also=Also(counts=("dim_out",)),
        scope=Scope(unless="unshared", whole=False),
    ),
    Units(
        "timm-maxvit-tf",
        MAXXVIT,
        QKV,
        also=Also(tensors=((TABLE, 0),), counts=BIAS_TF),
        scope=Scope(needs=("rel_pos.height_lookup",)),
    ),
    Units(
        "timm-maxvit",
        MAXXVIT,
        HEADS_FIRST,
        also=Also(tensors=MLP_BIAS, counts=BIAS),
        scope=Scope(needs=("head_first",)),
    ),
    Units(
        "timm-maxvit-qkv-first",
        MAXXVIT,
        QKV,
        also=Also(tensors=MLP_BIAS, counts=BIAS),
    ),
    Units(
        "timm-attention2d",
        ("timm.layers.attention2d.Attention2d",),
        QKV,
        scope=Scope(unless="head_first"),
    ),
    Units(
        "timm-multi-query",  # one key and one value for all heads, which stay
        ("timm.layers.attention2d.MultiQueryAttention2d",),
        (("query.proj", 1),),
        writer="output.proj",
    ),
    Units(
        "timm-levit",
        ("timm.models.levit.Attention",),
        (("qkv.linear", 1),),
        writer="proj.ln.linear",
        also=Also(layers=("qkv.bn",), tensors=LEVIT, counts=LEVIT_COUNTS, caches=CACHE),
        stream=Stream(after=("proj.ln.bn",)),
        scope=Scope(
            whole=False,  # a batch norm follows
        ),
    ),
    Units(
        "timm-levit-downsample",
        ("timm.models.levit.AttentionDownsample",),
        (("kv.linear", 1), ("q.ln.linear", 1)),
        writer="proj.ln.linear",
        also=Also(layers=("kv.bn", "q.ln.bn"), tensors=LEVIT, counts=LEVIT_COUNTS, caches=CACHE),
        stream=Stream(after=("proj.ln.bn",)),
        scope=Scope(whole=False),
    ),
    Units(
        "timm-efficientformer",
        ("timm.models.efficientformer.Attention",),
        HEADS_FIRST,
        also=Also(tensors=LEVIT, counts=LEVIT_COUNTS, caches=CACHE),
    ),
    Units(
        "timm-efficientformerv2",  # heads talk: every q, k and bias stays, a head's values and its last mix go
        ("timm.models.efficientformer_v2.Attention2d",),
        (("v.conv", 1),),
        writer="proj.conv",
        also=Also(layers=("v.bn", "v_local.conv", "v_local.bn", "talking_head2"), counts=("dh",), caches=CACHE),
        forwards=Forwards(pruned=HYBRID + "PrunedTalkingAttention2d"),
        stream=Stream(after=("proj.bn",)),
        scope=Scope(whole=False),
    ),
    Units(
        "timm-efficientformerv2-downsample",
        ("timm.models.efficientformer_v2.Attention2dDownsample",),
        (("q.proj.conv", 1), ("k.conv", 1), ("v.conv", 1)),
        writer="proj.conv",
        also=Also(
            layers=("q.proj.bn", "k.bn", "v.bn", "v_local.conv", "v_local.bn"),
            tensors=LEVIT,
            counts=("dh",),
            caches=CACHE,
        ),
        stream=Stream(after=("proj.bn",)),
        scope=Scope(whole=False),
    ),
    Units(
        "timm-tinyvit",
        ("timm.models.tiny_vit.Attention",),
        HEADS_FIRST,
        also=Also(tensors=LEVIT, counts=("out_dim",), caches=CACHE),
    ),
    Units(
        "timm-edgenext",
        ("timm.models.edgenext.CrossCovarianceAttn",),
        QKV,
        also=Also(tensors=(("temperature", 0),)),
        forwards=Forwards(pruned=HYBRID + "PrunedCrossCovarianceAttn"),
    ),
    Units(  # a linear layer in it, a map around it: its stream is gated at qkv
        "timm-fastvit",
        ("timm.models.fastvit.Attention",),
        QKV,
        forwards=Forwards(pruned=HYBRID + "PrunedFastVitAttention"),
        stream=Stream(tensors=(("qkv.weight", 1),)),
        scope=Scope(whole=False),
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
        also=Also(counts=("attention_dim",)),
        forwards=Forwards(pruned=HYBRID + "PrunedConvFormerAttention"),
    ),
    Units(
        "timm-lowformer",  # an upsampling follows; where it is the layer that the heads feed, they stay
        ("timm.models.lowformer.ConvAttention", "timm.models.cpubone.ConvAttention"),
        (("pwise", 1),),
        writer="o_proj",
        also=Also(counts=("o_proj_inpdim",)),
        scope=Scope(whole=False),
    ),
    Units(
        "timm-bottleneck",  # heads feed the block's last convolution
        ("timm.models.byobnet.SelfAttnBlock",),
        (("self_attn.qkv", 3),),
        writer="conv3_1x1.conv",
        count="self_attn.num_heads",
        also=Also(layers=("post_attn",), counts=("self_attn.dim_out_qk", "self_attn.dim_out_v")),
        scope=Scope(whole=False),
    ),
    Units(
        "timm-gated-mlp",  # gMLP: units are pairs of a value and a gate, which a norm and a mix of tokens run over
        ("timm.layers.mlp.GatedMlp",),
        (("fc1", 2),),
        writer="fc2",
        count="",
        kind="neuron",
        also=Also(norm="gate.norm"),
        scope=Scope(needs=("gate.proj",)),
    ),
    Units(
        "timm-grn-mlp",  # ConvNeXt v2: a global response norm runs over the units
        ("timm.layers.mlp.GlobalResponseNormMlp",),
        (("fc1", 1),),
        writer="fc2",
        count="",
        kind="neuron",
        also=Also(norm="grn"),
    ),
)
