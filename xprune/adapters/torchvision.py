"""The adapters of torchvision: the window attentions of Swin, SwinV2 and MaxViT, and an attribute of its ViT.

Heads of torchvision's ViT are found by the adapter of nn.MultiheadAttention, in `xprune.adapters.torch_nn`.
"""

from xprune.adapters.declarative import Sized, Units
from xprune.adapters.parts import Also, Forwards

# Classes are given as strings, not imported. Importing torchvision takes a second.
FORWARDS = "xprune.adapters.torchvision_forwards:"

TORCHVISION = (
    # The model's forward reshapes the patches to `hidden_dim` channels.
    Sized("torchvision-vit", ("torchvision.models.vision_transformer.VisionTransformer",), ("hidden_dim",)),
    Units(
        "torchvision-swin",
        ("torchvision.models.swin_transformer.ShiftedWindowAttention",),
        (("qkv", 3),),
        also=Also(tensors=(("relative_position_bias_table", 1),)),  # (positions, heads)
        forwards=Forwards(gated=FORWARDS + "WindowAttention", pruned=FORWARDS + "WindowAttention"),
    ),
    Units(
        "torchvision-swinv2",
        ("torchvision.models.swin_transformer.ShiftedWindowAttentionV2",),
        (("qkv", 3),),
        # A scale per head, and the last layer of the small MLP that computes the position bias of each head.
        also=Also(tensors=(("logit_scale", 0), ("cpb_mlp.2.weight", 0))),
        forwards=Forwards(gated=FORWARDS + "WindowAttentionV2", pruned=FORWARDS + "WindowAttentionV2"),
    ),
    Units(
        "torchvision-maxvit",
        ("torchvision.models.maxvit.RelativePositionalMultiHeadAttention",),
        (("to_qkv", 3),),
        consumer="merge",
        count="n_heads",
        also=Also(tensors=(("relative_position_bias_table", 1),)),
        # torchvision's forward calls `merge`, so it can be gated.
        forwards=Forwards(pruned=FORWARDS + "PartitionAttention"),
    ),
)
