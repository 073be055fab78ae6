"""Runs the pruner of torch-pruning, as another library to compare with in `benchmarks.proof`.

It prunes heads and MLP neurons. It leaves some numbers of heads wrong, so this file corrects them. Without that, the
pruned models do not run.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import xprune
from xprune.comparison.grid import Case, Peer

# Largest shares of heads to remove, in the order in which they are tried.
CAPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
# Steps of the search for the smallest ratio that meets the budget.
HALVINGS = 8
# Training batches from which gradients are taken.
BATCHES = 20
IMPORTANCES: dict[str, Callable[[], Any]] = {
    "taylor": tp.importance.GroupTaylorImportance,
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
}


def peers(task: xprune.Task | None = None) -> dict[str, Peer]:
    """Returns torch-pruning's pruners under their names in the table.

    Each importance is used twice: with one ranking of all layers ("global"), and with a ranking within each group of
    layers of the same structure ("isomorphic"). The task reads the batches and computes the loss of the gradients. None
    means classification.
    """
    return {
        f"torch-pruning {name}, {how}": _peer(name, how == "isomorphic", task or xprune.Classification())
        for name in IMPORTANCES
        for how in ("global", "isomorphic")
    }


def smallest(prune: Callable[[float, float], nn.Module], inputs: Any, allowed: float) -> nn.Module | None:
    """Searches the smallest ratio of units to remove that meets a budget, with the first cap that allows it.

    Args:
        prune: Returns the pruned model for (the ratio, the ratio of heads).
        inputs: The inputs on which MACs are counted.
        allowed: The MACs that the pruned model may have.

    Returns:
        The pruned model, or None if no ratio that was tried meets the budget.
    """
    for cap in CAPS:
        low, high, found = 0.0, 1.0, None
        for _ in range(HALVINGS):
            ratio = (low + high) / 2
            pruned = prune(ratio, min(ratio, cap))
            if xprune.count_macs(pruned, inputs) <= allowed:
                high, found = ratio, pruned
            else:
                low = ratio
        if found is not None:
            return found
    return None


def _peer(importance: str, isomorphic: bool, task: xprune.Task) -> Peer:
    """Returns the pruner with one importance."""

    def prune(case: Case, budget: xprune.Budget, seed: int) -> nn.Module:
        """Prunes with the smallest ratio that meets the budget.

        The library takes ratios of units and no budget, so the ratio is searched. It is the same for heads and
        neurons, up to a cap on the ratio of heads. The cap is needed because the library removes no head of an
        attention if it selects all of them. So large ratios can cost more than small ones. The first cap that allows
        the budget is used.

        All units are removed in one step. With more steps, the library's global ranking of heads raises an
        UnboundLocalError from the second step on, if a step removes no head.
        """
        torch.manual_seed(seed)
        inputs = task.example(task.unpack(next(iter(case.train)))[0])
        allowed = (budget.macs or 1.0) * xprune.count_macs(case.model, inputs)
        gradients = _gradients(case, task) if importance == "taylor" else {}
        found = smallest(
            lambda ratio, cap: _pruned(case.model, inputs, ratio, cap, importance, isomorphic, gradients),
            inputs,
            allowed,
        )
        if found is None:
            raise RuntimeError(f"torch-pruning, {importance}: no ratio that was tried reaches {budget}.")
        return found

    return prune


def _gradients(case: Case, task: xprune.Task) -> dict[str, Tensor]:
    """Returns the gradient of each parameter, summed over the first training batches."""
    model = copy.deepcopy(case.model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for _, batch in zip(range(BATCHES), case.train, strict=False):
        inputs, targets = task.unpack(batch)
        task.loss(task.forward(model, inputs), targets).backward()
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
    """Returns a copy of the model, pruned at this ratio, with its numbers of heads corrected."""
    model = copy.deepcopy(model).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = gradients[name].clone() if name in gradients else None
    attentions = {path: m for path, m in model.named_modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    dense = {path: m.qkv.weight.detach().clone() for path, m in attentions.items()}
    targets = {m.qkv for m in attentions.values()} | {m.fc1 for m in model.modules() if hasattr(m, "fc1")}
    # The residual stream and the embedding stay whole.
    others = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in targets]
    # torch-pruning leaves these tables alone. `correct_heads` cuts them.
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
        correct_heads(model.get_submodule(path), weight)
    model.zero_grad(set_to_none=True)
    return model


def _has_table(module: nn.Module) -> bool:
    """Returns True if the attention has a table of relative position biases, as in Swin."""
    return getattr(module, "relative_position_bias_table", None) is not None


def correct_heads(module: Any, dense: Tensor) -> None:
    """Sets the number of heads of an attention after pruning, and cuts the bias table of Swin to the kept heads.

    The heads are counted in the weights. If torch-pruning selects all heads of an attention, it keeps all of them, but
    it sets their number to 0.

    Args:
        module: The pruned attention.
        dense: The dense weight of its `qkv`. It shows which heads were kept.
    """
    heads = module.qkv.out_features // (len(dense) // module.num_heads)
    if _has_table(module):
        before = dense.view(3, module.num_heads, -1)[0]
        after = module.qkv.weight.detach().view(3, heads, -1)[0]
        kept = [next(h for h, row in enumerate(before) if torch.equal(row, wanted)) for wanted in after]
        module.relative_position_bias_table = nn.Parameter(module.relative_position_bias_table[:, kept].detach())
    module.num_heads, module.attn_dim = heads, module.qkv.out_features // 3
