"""Tiny random models, one for each variant of the ViT, Swin and CaiT that xprune prunes, and data for them."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GluMlp, PatchEmbed, SwiGLU
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import xprune
from xprune.testing import perturb

SIZE, CLASSES = 32, 7
VIT: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN: dict[str, Any] = {"img_size": SIZE, "patch_size": 2, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
SWIGLU_NORM = partial(SwiGLU, norm_layer=nn.LayerNorm)


def vit(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds a tiny ViT from a timm name."""
    return lambda: timm.create_model(name, num_classes=CLASSES, **{**VIT, **kwargs})


class ConvStem(PatchEmbed):
    """A patch embedding of two convolutions, with a batch norm between them."""

    def __init__(self, embed_dim: int, **kwargs: Any) -> None:
        super().__init__(embed_dim=embed_dim, **kwargs)
        hidden = nn.Conv2d(3, 12, 8, 8, bias=False), nn.BatchNorm2d(12), nn.ReLU()
        self.proj = nn.Sequential(*hidden, nn.Conv2d(12, embed_dim, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit(),
    "deit-distilled": vit("deit_tiny_distilled_patch16_224"),
    "deit3": vit("deit3_small_patch16_224"),
    "qk-norm": vit(qk_norm=True),
    "norms over units": vit(scale_attn_norm=True, scale_mlp_norm=True),
    "registers": vit("vit_small_patch14_reg4_dinov2"),
    "attention pooling": vit(global_pool="map", class_token=False),
    "convolutional stem": vit(embed_layer=ConvStem),
    "no biases": vit(qkv_bias=False, proj_bias=False),
    "swiglu": vit(mlp_layer=SwiGLU),
    "swiglu with norm": vit(mlp_layer=SWIGLU_NORM),
    "packed glu": vit(mlp_layer=GluMlp),
    "packed glu with norm": vit(mlp_layer=partial(GluMlp, norm_layer=nn.LayerNorm)),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, window_size=4, **SWIN),
    "swinv2": lambda: timm.create_model("swinv2_tiny_window8_256", num_classes=CLASSES, window_size=4, **SWIN),
    "class attention": lambda: timm.create_model(
        "cait_xxs24_224", img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=CLASSES
    ),
}
THREE = ("vit", "swin", "swinv2")


def build(name: str) -> nn.Module:
    """Returns the model of this name. Every weight is random, and the same at every call."""
    torch.manual_seed(0)
    return perturb(MODELS[name]())


def images(rows: int = 2, seed: int = 0) -> Tensor:
    """Returns noise, float32 (rows, 3, 32, 32)."""
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def loader(rows: int = 16, batch: int = 8, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Returns batches of noise with a label that can be learned: the brightest of 7 stripes."""
    x = images(rows, seed=1)
    y = torch.arange(rows) % CLASSES
    for index, label in enumerate(y.tolist()):
        x[index, :, :, 4 * label : 4 * label + 4] += 3
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=shuffle)


class Killed(RuntimeError):
    """Ends a run in the middle of an epoch."""


class Fuse:
    """A data set that raises `Killed` after a number of reads."""

    def __init__(self, data: Any, after: int) -> None:
        self.data, self.left = data, itertools.count(after, -1)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if next(self.left) <= 0:
            raise Killed
        return self.data[index]


def fused(batch: int, after: int = 10**9) -> DataLoader[Any]:
    """Returns shuffled batches of the 16 samples of `loader`. Reading fails after `after` samples."""
    return DataLoader(Fuse(loader(16).dataset, after), batch, shuffle=True)  # type: ignore[arg-type]


def assert_gated_apart(model, inputs, sites):
    """Asserts that each of three samples is gated in a batch as it is gated without the others."""
    rows = [torch.rand(3, site.size) for site in sites]
    with xprune.Gates(sites, rows).attached(model):
        together = model(inputs)
    for index in range(3):
        with xprune.Gates(sites, [row[index] for row in rows]).attached(model):
            torch.testing.assert_close(together[index], model(inputs[index : index + 1])[0], atol=1e-5, rtol=1e-4)


class Residual(nn.Module):
    """Adds an MLP to its input, and applies a linear layer."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(x + self.mlp(x))
        return made
