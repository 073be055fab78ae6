"""The adapters of timm: entries by family, and forwards for classes whose own forward assumes all heads.

`plain` holds ViT and Swin, `vit` their variants, and `hybrid` the families with convolutions. `streams` holds modules
that have no units but depend on the hidden size. The `*_forwards` files hold the classes that a module gets after heads
were removed.

May import: `adapters.declarative`, core, modules, errors. To add a family, write a file and add its table to
`TIMM_ALL`.
"""

from xprune.adapters.timm.hybrid import TIMM_HYBRID
from xprune.adapters.timm.plain import TIMM
from xprune.adapters.timm.streams import STREAMS
from xprune.adapters.timm.vit import TIMM_VIT

TIMM_ALL = (*TIMM, *TIMM_VIT, *TIMM_HYBRID, *STREAMS)
