"""The adapters for timm, and replacement forwards for attentions whose forward works only with all heads.

`plain` holds the adapters for ViT and Swin, `vit` those for other transformers, and `hybrid` those for models that
combine convolutions and attention. `streams` holds adapters for modules that have no units but depend on the hidden
size. The files `*_forwards` hold the replacement forwards: the classes that modules get after heads were removed.

May import: `adapters.declarative`, core, modules, errors. To add a family of models, write a file with its adapters and
add them to `TIMM_ALL`.
"""

from xprune.adapters.timm.hybrid import TIMM_HYBRID
from xprune.adapters.timm.plain import TIMM
from xprune.adapters.timm.streams import STREAMS
from xprune.adapters.timm.vit import TIMM_VIT

TIMM_ALL = (*TIMM, *TIMM_VIT, *TIMM_HYBRID, *STREAMS)
