"""The other side of the proofs: torch-pruning's own pruner, heads and MLPs, attributes set by hand so that it runs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

import xprune
from xprune.comparison.grid import Case, Peer

CAPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
HALVINGS = 8
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
        """The least ratio that meets the MACs, the same for heads and neurons up to a cap on the ratio of heads.

        Ratios are all that the library takes. Where it selects every head of an attention it removes none of them, so
        that large ratios cost more than small ones: the first cap under which the MACs are reached is taken. In one
        step: from the second one on, its global ranking of heads stops with an UnboundLocalError wherever a step has
        no head to remove.
        """
        torch.manual_seed(seed)
        inputs = next(iter(case.train))[0][:2]
        allowed = (budget.macs or 1.0) * xprune.count_macs(case.model, inputs)
        gradients = _gradients(case) if importance == "taylor" else {}
        for cap in CAPS:
            low, high, found = 0.0, 1.0, None
            for _ in range(HALVINGS):
                ratio = (low + high) / 2
                pruned = _pruned(case.model, inputs, ratio, min(ratio, cap), importance, isomorphic, gradients)
                if xprune.count_macs(pruned, inputs) <= allowed:
                    high, found = ratio, pruned
                else:
                    low = ratio
            if found is not None:
                return found
        raise RuntimeError(f"torch-pruning, {importance}: no ratio tried reaches {budget}.")

    return prune


def _gradients(case: Case) -> dict[str, Tensor]:
    model = copy.deepcopy(case.model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for _, (images, labels) in zip(range(BATCHES), case.train, strict=False):
        F.cross_entropy(model(images), labels).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _pruned(
    model: nn.Module,
    inputs: Tensor,
    ratio: float,
    head_ratio: float,
    importance: str,
    isomorphic: bool,
    gradients: dict[str, Tensor],
) -> nn.Module:
    model = copy.deepcopy(model).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = gradients[name].clone() if name in gradients else None
    attentions = {path: m for path, m in model.named_modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    dense = {path: m.qkv.weight.detach().clone() for path, m in attentions.items()}
    targets = {m.qkv for m in attentions.values()} | {m.fc1 for m in model.modules() if hasattr(m, "fc1")}
    others = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in targets]
    tables = [m.relative_position_bias_table for m in attentions.values() if _has_table(m)]
    pruner = tp.pruner.BasePruner(
        model,
        (inputs,),
        importance=IMPORTANCES[importance](),
        global_pruning=True,
        isomorphic=isomorphic,
        pruning_ratio=ratio,
        head_pruning_ratio=head_ratio,
        max_pruning_ratio=0.98,
        num_heads={m.qkv: m.num_heads for m in attentions.values()},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[*others, *tables],
    )
    pruner.step()
    for path, weight in dense.items():
        _fix(model.get_submodule(path), weight)
    model.zero_grad(set_to_none=True)
    return model


def _has_table(module: nn.Module) -> bool:
    return getattr(module, "relative_position_bias_table", None) is not None


def _fix(module: Any, dense: Tensor) -> None:
    """Sets the counts that torch-pruning leaves, and cuts Swin's bias table to the heads that are still there.

    Counted on the weights: where it selects every head of an attention, it says 0 and leaves all of them there.
    """
    left = module.qkv.out_features // (len(dense) // module.num_heads)
    if _has_table(module):
        before = dense.view(3, module.num_heads, -1)[0]
        after = module.qkv.weight.detach().view(3, left, -1)[0]
        kept = [next(h for h, row in enumerate(before) if torch.equal(row, wanted)) for wanted in after]
        module.relative_position_bias_table = nn.Parameter(module.relative_position_bias_table[:, kept].detach())
    module.num_heads, module.attn_dim = left, module.qkv.out_features // 3
