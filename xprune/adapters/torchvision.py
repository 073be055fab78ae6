"""The adapters for torchvision: for the window attentions of Swin, SwinV2 and MaxViT, and for an attribute of ViT.

The adapter for nn.MultiheadAttention in `xprune.adapters.torch_nn` finds the heads of torchvision's ViT.
"""

from xprune.adapters.declarative import Sized, Units
from xprune.adapters.parts import Also, Forwards

# The classes are given as strings and imported when they are needed, because the import of torchvision takes a second.
FORWARDS = "xprune.adapters.torchvision_forwards:"

TORCHVISION = (
    # The forward of the model reshapes the patches to `hidden_dim` channels.
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
        # logit_scale has one number for each head. cpb_mlp.2 is the last layer of the small MLP that computes the
        # position bias of each head.
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
