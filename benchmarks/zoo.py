"""Builds the models of `benchmarks.prunability`: one or more of each family.

All weights are random. Nothing is downloaded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from benchmarks.hugging_face_models import MODELS

TIMM = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vit_small_patch14_reg4_dinov2",
    "samvit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "pvt_v2_b0",
    "twins_svt_small",
    "crossvit_tiny_240",
    "convit_tiny",
    "tnt_s_legacy_patch16_224",
    "volo_d1_224",
    "nest_tiny",
    "visformer_tiny",
    "hiera_tiny_224",
    "gcvit_xxtiny",
    "davit_tiny",
    "naflexvit_base_patch16_gap",
    "mvitv2_tiny",
    "coatnet_pico_rw_224",
    "maxvit_pico_rw_256",
    "maxvit_tiny_tf_224",
    "maxvit_tiny_pm_256",
    "maxxvit_rmlp_nano_rw_256",
    "levit_128s",
    "levit_conv_128s",
    "coat_lite_tiny",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "fastvit_sa12",
    "focalnet_tiny_srf",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "nextvit_small",
    "pit_ti_224",
    "poolformer_s12",
    "convformer_s18",
    "caformer_s18",
    "swiftformer_xs",
    "tiny_vit_5m_224",
    "vitamin_small_224",
    "mixer_s32_224",
    "gmixer_24_224",
    "gmlp_ti16_224",
    "resmlp_12_224",
    "convnext_atto",
    "convnextv2_atto",
    "efficientvit_b0",
    "efficientvit_m0",
    "botnet26t_256",
    "mobilenetv4_hybrid_medium",
    "shvit_s1",
    "lowformer_b0",
    "iformer_t",
    "cpubone_nano",
    "csatv2",
    "inception_next_atto",
    "repvit_m0_9",
    "mambaout_femto",
]
TORCHVISION = ["vit_b_32", "swin_t", "swin_v2_t", "maxvit_t", "convnext_tiny"]
GRAPHS = ["GATConv", "GATv2Conv", "TransformerConv", "GPSConv"]


class Graphs(nn.Module):
    """Two graph convolutions with four heads, and a classifier of the nodes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        # torch_geometric is an optional dependency.
        import torch_geometric.nn as pyg

        self.lin, self.out = nn.Linear(16, 32), nn.Linear(32, 5)
        if kind == "GPSConv":
            make = partial(self._gps, pyg)
        else:
            make = partial(getattr(pyg, kind), 32, 8, heads=4)
        self.convs = nn.ModuleList(make() for _ in range(2))

    # A GPSConv is a transformer block over a graph, around another convolution.
    @staticmethod
    def _gps(pyg: Any) -> nn.Module:
        conv: nn.Module = pyg.GPSConv(32, pyg.GATConv(32, 32, heads=4, concat=False), heads=4)
        return conv

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        """Returns logits (nodes, classes)."""
        x = self.lin(x)
        for conv in self.convs:
            x = conv(x, edge_index).relu()
        return self.out(x)


def _timm(name: str) -> tuple[nn.Module, Any]:
    """Returns a timm model and one image of its size."""
    model = timm.create_model(name)
    config: Any = model.pretrained_cfg
    # Some models have no classifier and return their residual stream, whose channels could not be removed then.
    if not getattr(model, "num_classes", 1):
        model = timm.create_model(name, num_classes=10)
    return model, torch.randn(1, *config["input_size"])


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    """Returns a torchvision model and one image."""
    return torchvision.models.get_model(name), torch.randn(1, 3, 224, 224)


def _torch(name: str) -> tuple[nn.Module, Any]:
    """Returns a classifier of tokens with an nn.TransformerEncoder, and one sample of 16 tokens."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=name == "norm first")
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(32, 64), encoder, nn.Linear(64, 5)), torch.randn(1, 16, 32)


def _graphs(name: str) -> tuple[nn.Module, Any]:
    """Returns a graph network, and a graph of 24 nodes and 72 edges."""
    return Graphs(name), (torch.randn(24, 16), torch.randint(24, (2, 72)))


def _graph_transformer() -> tuple[nn.Module, Any]:
    # That file imports torch_geometric, which is an optional dependency.
    from benchmarks.graphs import GraphTransformer

    return GraphTransformer(16, 5, hidden_size=32), _graphs(GRAPHS[0])[1]


BUILDERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{name: partial(_timm, name) for name in TIMM},
    **{f"torchvision {name}": partial(_torchvision, name) for name in TORCHVISION},
    **{f"torch encoder, {name}": partial(_torch, name) for name in ("norm first", "norm last")},
    **MODELS,
    **{f"pyg {name}": partial(_graphs, name) for name in GRAPHS},
    "pyg graph transformer": _graph_transformer,
}
"""Name -> a function that builds (model, example inputs).

Models of timm take images of their own size. Models of Hugging Face are made small.
"""
