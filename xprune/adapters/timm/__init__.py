"""timm's attentions and MLPs: entries as data by family, and the forwards that some of them need once heads are gone.

`plain` (ViT, Swin), `vit` (their variants), `hybrid` (convolutional families), `streams` (what runs along a stream).
"""

from xprune.adapters.timm.hybrid import TIMM_HYBRID
from xprune.adapters.timm.plain import TIMM
from xprune.adapters.timm.streams import STREAMS
from xprune.adapters.timm.vit import TIMM_VIT

TIMM_ALL = (*TIMM, *TIMM_VIT, *TIMM_HYBRID, *STREAMS)
