"""The adapters for timm's ViT, Swin and gated MLPs, one for each class. `Units` explains the fields."""

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Forwards

# Order of the rows of qkv: the queries of all heads, then the keys of all heads, then the values of all heads.
QKV = (("qkv", 3),)

TIMM = (
    Units(
        "timm-attention",
        ("timm.layers.attention.Attention",),
        QKV,
        # A module may lack both layers. `gate` is a linear layer that makes a factor for each feature of the heads.
        # `norm` computes its mean and variance over the features of all heads. If it is an nn.Identity, it has no
        # tensors, so there is no cut.
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
                ("logit_scale", 0),  # its shape is (heads, 1, 1)
                ("cpb_mlp.2.weight", 0),  # the last layer of the MLP that computes each head's position bias
                # The biases of qkv are parameters of the attention and not of the layer qkv.
                ("q_bias", 0),
                ("k_bias", 0),  # a buffer of zeros
                ("v_bias", 0),
            ),
        ),
        # A string, not the class: importing timm takes longer than importing the rest of this package.
        forwards=Forwards(pruned="xprune.adapters.timm.plain_forwards:PrunedWindowAttentionV2"),
    ),
    Units(
        # SwiGLUPacked. A unit is a value and its gate: one row in each half of fc1. timm's SwiGLU has a separate layer
        # for each half. It needs no adapter, because xprune finds its neurons in the dependency graph.
        "timm-glu",
        ("timm.layers.mlp.GluMlp",),
        (("fc1", 2),),
        consumer="fc2",
        count="",
        kind="neuron",
        also=Also(norm="norm"),
    ),
)
