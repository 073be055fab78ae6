"""torchvision's window attentions (Swin, SwinV2, MaxViT), and its ViT, which is built of nn.MultiheadAttention."""

from xprune.adapters.declarative import Sized, Units
from xprune.adapters.parts import Also, Forwards

# Classes are named, not imported: importing torchvision takes a second.
FORWARDS = "xprune.adapters.torchvision_forwards:"

TORCHVISION = (
    Sized("torchvision-vit", ("torchvision.models.vision_transformer.VisionTransformer",), ("hidden_dim",)),
    Units(
        "torchvision-swin",
        ("torchvision.models.swin_transformer.ShiftedWindowAttention",),
        (("qkv", 3),),
        also=Also(tensors=(("relative_position_bias_table", 1),)),
        forwards=Forwards(gated=FORWARDS + "WindowAttention", pruned=FORWARDS + "WindowAttention"),
    ),
    Units(
        "torchvision-swinv2",
        ("torchvision.models.swin_transformer.ShiftedWindowAttentionV2",),
        (("qkv", 3),),
        also=Also(tensors=(("logit_scale", 0), ("cpb_mlp.2.weight", 0))),
        forwards=Forwards(gated=FORWARDS + "WindowAttentionV2", pruned=FORWARDS + "WindowAttentionV2"),
    ),
    Units(
        "torchvision-maxvit",
        ("torchvision.models.maxvit.RelativePositionalMultiHeadAttention",),
        (("to_qkv", 3),),
        writer="merge",
        count="n_heads",
        also=Also(tensors=(("relative_position_bias_table", 1),)),
        forwards=Forwards(pruned=FORWARDS + "PartitionAttention"),
    ),
)
