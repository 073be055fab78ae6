"""Exactness: the pruned model against the gated dense one, on every architecture, at its real size.

    python -m benchmarks.exactness [--seeds 20] [--only swin]

Weights are random and perturbed, so that nothing is zero-initialised away. Plans are random, different at every site,
from all units to one, and with whole attentions and MLPs gone. Float32, eval mode, two rows.
"""

from collections.abc import Callable
from typing import Annotated, Any

import timm
import torch
import typer
from timm.layers import SwiGLU
from torch import nn

import xprune
from benchmarks.record import record
from xprune.adapters import ADAPTERS
from xprune.modules.copies import shared_copy
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import TOLERANCE, effect, prove
from xprune.testing import perturb, random_plan

NAMES = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit3_small_patch16_224",
    "deit3_base_patch16_224",
    "vit_small_patch16_18x2_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",  # pools by an attention that is left alone
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_small_window8_256",
    "swinv2_base_window8_256",
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_small, qk-norm": ("vit_small_patch16_224", {"qk_norm": True}),
    "vit_small, LayerScale": ("vit_small_patch16_224", {"init_values": 1e-5}),
    "vit_small, norms over units": ("vit_small_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "vit_small, SwiGLU": ("vit_small_patch16_224", {"mlp_layer": SwiGLU}),
    "dinov2 giant, packed SwiGLU, 4 of 40 blocks": ("vit_giant_patch14_reg4_dinov2", {"depth": 4, "img_size": 224}),
}


def models() -> dict[str, Callable[[], nn.Module]]:
    """Builders of dense models by title."""
    every = {**{name: (name, _smaller(name)) for name in NAMES}, **VARIANTS}
    return {
        title: lambda name=name, args=args: timm.create_model(name, **args) for title, (name, args) in every.items()
    }


def _smaller(name: str) -> dict[str, Any]:
    return {"img_size": 224} if "dinov2" in name else {}  # 518 otherwise: 5 times the tokens, the same weights


@torch.no_grad()
def measure(title: str, build: Callable[[], nn.Module], seeds: int) -> dict[str, Any]:
    """One row: the largest error over all plans, beside what is allowed and how far the gates moved the output."""
    torch.manual_seed(0)
    model = perturb(build())
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    if "dinov2" in title:
        x = x[..., :224, :224]
    sites = xprune.find_sites(model, x)
    errors, relative, moved, gone = [], [], [], 0
    for seed in range(seeds):
        plan = random_plan(sites, seed)
        found = prove(model, remove_units(shared_copy(model), plan, ADAPTERS), plan, x).difference
        errors.append(found.error)
        relative.append(found.relative)
        moved.append(effect(model, plan, x).error)
        gone += sum(not keep for keep in plan.keeps)
    row = {
        "model": title,
        "sites": len(sites),
        "units": sum(site.size for site in sites),
        "plans": seeds,
        "wholly gone": gone,
        "largest error": max(errors),
        "relative": max(relative),
        "gates moved the output by at least": min(moved),
    }
    row["exact"] = max(relative) <= TOLERANCE and min(moved) > 10 * max(errors)
    return row


def main(seeds: int = 20, only: Annotated[str, typer.Option(help="part of a title")] = "") -> None:
    """Measures every architecture and records the table."""
    rows = []
    for title, build in models().items():
        if only in title:
            rows.append(measure(title, build, seeds))
            print(rows[-1], flush=True)
    about = f"max |gated - pruned| over {seeds} random plans; allowed: {TOLERANCE} x max |output|"
    record("exactness" + (f"-{only}" if only else ""), rows, about, seeds=seeds, tolerance=TOLERANCE, batch=2)
    if not all(row["exact"] for row in rows):
        raise SystemExit("not exact: " + ", ".join(row["model"] for row in rows if not row["exact"]))


if __name__ == "__main__":
    typer.run(main)
