"""timm's attentions and MLPs, an entry for each class. Names are timm's; `Units` says what each field means."""

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Forwards

QKV = (("qkv", 3),)

TIMM = (
    Units(
        "timm-attention",
        ("timm.layers.attention.Attention",),
        QKV,
        also=Also(layers=("gate",), norm="norm", counts=("attn_dim",)),
    ),
    Units(
        "timm-swin",
        ("timm.models.swin_transformer.WindowAttention",),
        QKV,
        also=Also(tensors=(("relative_position_bias_table", 1),)),
    ),
    Units(
        "timm-swinv2",
        ("timm.models.swin_transformer_v2.WindowAttention",),
        QKV,
        also=Also(
            tensors=(
                ("logit_scale", 0),
                ("cpb_mlp.2.weight", 0),
                ("q_bias", 0),
                ("k_bias", 0),  # a buffer of zeros
                ("v_bias", 0),
            ),
        ),
        forwards=Forwards(pruned="xprune.adapters.timm.plain_forwards:PrunedWindowAttentionV2"),
    ),
    Units(
        "timm-glu",  # SwiGLUPacked: fc1 holds values and gates; the graph finds the SwiGLU whose layers are apart
        ("timm.layers.mlp.GluMlp",),
        (("fc1", 2),),
        writer="fc2",
        count="",
        kind="neuron",
        also=Also(norm="norm"),
    ),
)
