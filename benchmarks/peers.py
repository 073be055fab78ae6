"""The other side of the proofs: torch-pruning's own pruner, heads and MLPs, attributes set by hand so that it runs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

import xprune
from xprune.compare import Case, Peer

STEPS = 100
BATCHES = 20
IMPORTANCES: dict[str, Callable[[], Any]] = {
    "taylor": tp.importance.GroupTaylorImportance,
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
}


def peers() -> dict[str, Peer]:
    """torch-pruning with each importance, global over all layers, and global within isomorphic groups."""
    return {
        f"torch-pruning {name}, {how}": _peer(name, how == "isomorphic")
        for name in IMPORTANCES
        for how in ("global", "isomorphic")
    }


def _peer(importance: str, isomorphic: bool) -> Peer:
    def prune(case: Case, budget: xprune.Budget, seed: int) -> nn.Module:
        """Steps of 1 % until the MACs are met, as in the library's own ImageNet example (ratios are all it takes)."""
        torch.manual_seed(seed)
        model, batches = copy.deepcopy(case.model).eval(), iter(case.train)
        inputs = next(iter(case.train))[0][:2]
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        attentions = {path: m for path, m in model.named_modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
        dense = {path: m.qkv.weight.detach().clone() for path, m in attentions.items()}
        tables = [m.relative_position_bias_table for m in attentions.values() if _has_table(m)]
        pruned = {m.qkv for m in attentions.values()} | {m.fc1 for m in model.modules() if hasattr(m, "fc1")}
        ignored = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in pruned]
        pruner = tp.pruner.BasePruner(
            model,
            (inputs,),
            importance=IMPORTANCES[importance](),
            global_pruning=True,
            isomorphic=isomorphic,
            pruning_ratio=1.0,
            max_pruning_ratio=0.98,
            iterative_steps=STEPS,
            num_heads={m.qkv: m.num_heads for m in attentions.values()},
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=1.0,
            ignored_layers=[*ignored, *tables],
        )
        if importance == "taylor":
            for _, (images, labels) in zip(range(BATCHES), batches, strict=False):
                F.cross_entropy(model(images), labels).backward()
        allowed = budget.macs * xprune.count_macs(case.model, inputs)
        for _ in range(STEPS):
            pruner.step()
            fixed = copy.deepcopy(model)
            _fix(fixed, dense, {path: pruner.num_heads[m.qkv] for path, m in attentions.items()})
            if xprune.count_macs(fixed, inputs) <= allowed:
                fixed.zero_grad(set_to_none=True)
                return fixed
        raise RuntimeError(f"torch-pruning, {importance}: {budget} was not reached in {STEPS} steps.")

    return prune


def _has_table(module: nn.Module) -> bool:
    return getattr(module, "relative_position_bias_table", None) is not None


def _fix(model: nn.Module, dense: dict[str, torch.Tensor], heads: dict[str, int]) -> None:
    """Sets the counts that torch-pruning leaves, and cuts Swin's bias tables to the heads that are still there."""
    for path, weight in dense.items():
        module: Any = model.get_submodule(path)
        if _has_table(module):
            before = weight.view(3, module.num_heads, -1)[0, :, : weight.shape[1]]
            left = module.qkv.weight.detach().view(3, heads[path], -1)[0, :, : weight.shape[1]]
            kept = [next(h for h in range(len(before)) if torch.equal(before[h], row)) for row in left]
            module.relative_position_bias_table = nn.Parameter(module.relative_position_bias_table[:, kept].detach())
        module.num_heads = heads[path]
        module.attn_dim = module.qkv.out_features // 3
