"""What is known of timm's classes: entries by family, and new forwards for classes that assume all heads are there.

`plain` has ViT and Swin, `vit` their variants, `hybrid` the families with convolutions, `streams` what reads or writes
the residual stream. May import: `adapters.declarative`, core, modules, errors. A new family is a file and a line here.
"""

from xprune.adapters.timm.hybrid import TIMM_HYBRID
from xprune.adapters.timm.plain import TIMM
from xprune.adapters.timm.streams import STREAMS
from xprune.adapters.timm.vit import TIMM_VIT

TIMM_ALL = (*TIMM, *TIMM_VIT, *TIMM_HYBRID, *STREAMS)
