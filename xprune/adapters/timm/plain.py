"""The adapters of timm's ViT, Swin and gated MLPs: an entry for each class. `Units` explains the fields."""

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Forwards

# Rows of qkv: queries of all heads, then keys of all heads, then values of all heads.
QKV = (("qkv", 3),)

TIMM = (
    Units(
        "timm-attention",
        ("timm.layers.attention.Attention",),
        QKV,
        # Both are optional. `gate` is a linear layer that makes a factor for each feature of the heads' output. `norm`
        # runs over the features of all heads. An nn.Identity in its place has no tensors, so it adds no cut.
        also=Also(layers=("gate",), norm="norm", attributes=("attn_dim",)),
    ),
    Units(
        "timm-swin",
        ("timm.models.swin_transformer.WindowAttention",),
        QKV,
        also=Also(tensors=(("relative_position_bias_table", 1),)),  # (positions, heads)
    ),
    Units(
        "timm-swinv2",
        ("timm.models.swin_transformer_v2.WindowAttention",),
        QKV,
        also=Also(
            tensors=(
                ("logit_scale", 0),  # (heads, 1, 1)
                ("cpb_mlp.2.weight", 0),  # the last layer of the MLP that computes each head's position bias
                # The biases of qkv are parameters of the attention, not of the layer.
                ("q_bias", 0),
                ("k_bias", 0),  # a buffer of zeros
                ("v_bias", 0),
            ),
        ),
        # A string, not the class: importing timm takes longer than importing the rest of this package.
        forwards=Forwards(pruned="xprune.adapters.timm.plain_forwards:PrunedWindowAttentionV2"),
    ),
    Units(
        # SwiGLUPacked. A neuron is a pair of a value and a gate: a row in each half of fc1. timm's SwiGLU, with a layer
        # for each half, needs no entry: its neurons are found in the graph.
        "timm-glu",
        ("timm.layers.mlp.GluMlp",),
        (("fc1", 2),),
        consumer="fc2",
        count="",
        kind="neuron",
        also=Also(norm="norm"),
    ),
)
