"""Checks that pruned models equal their gated dense models, on 27 timm architectures at real size.

    python -m benchmarks.exactness [--seeds 20] [--only swin]

Each model is pruned with random plans. Sites keep different numbers of units, from one to all but one, and some plans
remove whole attentions and MLPs. The outputs of the pruned model are compared with the outputs of the dense model
whose gates are 0 on the removed units. The goal: each output differs by at most 1e-4 of its own size.

Weights are random, with noise on every parameter: a layer that starts at zero would hide mistakes before it. Float32,
eval mode, two images. The result is docs/results/exactness.json, or exactness-ONLY.json if --only is given.
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
    # This model pools its tokens with an attention that is left alone.
    "vit_base_patch16_siglip_224",
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
    """Returns a function that builds the dense model, for each title."""
    every = {**{name: (name, _smaller(name)) for name in NAMES}, **VARIANTS}
    return {
        title: lambda name=name, args=args: timm.create_model(name, **args) for title, (name, args) in every.items()
    }


def _smaller(name: str) -> dict[str, Any]:
    """Returns timm's arguments that make images smaller, where the model's own images are large."""
    # DINOv2 takes images of 518 x 518. They have 5 times the tokens of 224 x 224, for the same weights.
    return {"img_size": 224} if "dinov2" in name else {}


@torch.no_grad()
def measure(title: str, build: Callable[[], nn.Module], seeds: int) -> dict[str, Any]:
    """Measures one model and returns its row of the table.

    The row holds the largest absolute and relative error over all plans. It also holds the least that the gates changed
    the output: if they changed nothing, equal outputs would prove nothing.
    """
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


def main(
    seeds: Annotated[int, typer.Option(help="random plans for each model")] = 20,
    only: Annotated[str, typer.Option(help="only models whose title contains this text")] = "",
) -> None:
    """Checks every architecture and records the table. Ends with an error if a model is not exact."""
    rows = []
    for title, build in models().items():
        if only in title:
            rows.append(measure(title, build, seeds))
            print(rows[-1], flush=True)
    about = f"largest |gated - pruned| over {seeds} random plans. Allowed: {TOLERANCE} of the size of each output"
    record("exactness" + (f"-{only}" if only else ""), rows, about, seeds=seeds, tolerance=TOLERANCE, batch=2)
    if not all(row["exact"] for row in rows):
        raise SystemExit("These models are not exact: " + ", ".join(row["model"] for row in rows if not row["exact"]))


if __name__ == "__main__":
    typer.run(main)
