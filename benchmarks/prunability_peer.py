"""The other side of the prunability table: torch-pruning alone, its own pruner, attributes set by hand so it runs.

Its BasePruner with one ratio for heads and neurons, found by halving, `num_heads` given, counts set by hand. Exact is
what equals the dense model in which the columns of each layer that read what was pruned are zero.
"""

import copy
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import xprune
from xprune.modules.calls import call, tensors_in

HALVINGS = 5
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
COUNTS = (*HEADS, "attn_dim", "attention_dim", "dim_out", "out_dim", "key_attn_dim", "val_attn_dim", "all_head_size")
"""Attributes that hold the heads, or a multiple of them."""
READERS = ("qkv", "q", "k", "v", "kv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin")
HIDDEN = ("fc1", "fc1_g", "fc1_x", "linear1", "mlp.0", "intermediate.dense", "gate_proj", "up_proj", "lin1", "c_fc")


def _heads(module: nn.Module) -> int:
    """The heads that a module says it has, 0 where it does not say."""
    found = [getattr(module, name, None) for name in HEADS]
    return next((count for count in found if isinstance(count, int)), 0)


def by_torch_pruning(model: nn.Module, inputs: Any, asked: float) -> dict[str, Any]:
    """What torch-pruning makes of it: the smallest ratio that meets the MACs, or the largest tried."""
    if hasattr(model, "config"):
        model.config.use_cache = False  # of which its tracer can make nothing
    dense = xprune.count_macs(model, inputs)
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        made = _at_ratio(model, inputs, ratio)
        got = xprune.count_macs(made[0], inputs) / dense
        if got <= asked:
            high, best = ratio, (*made, got)
        else:
            low, best = ratio, best or (*made, got)
    assert best is not None
    pruned, zeroed, got = best
    with torch.no_grad():
        expected, out = (tensors_in(call(m.eval(), inputs))[0] for m in (zeroed, pruned))
    error = float((expected - out).abs().max() / expected.abs().max().clamp_min(1.0))
    return {"sites": "", "asked": asked, "hit": got, "error": error}


def _at_ratio(model: nn.Module, inputs: Any, ratio: float) -> tuple[nn.Module, nn.Module]:
    """(pruned, dense with the columns that read what was pruned at zero)."""
    pruned, zeroed = copy.deepcopy(model).eval().requires_grad_(True), copy.deepcopy(model).eval()
    names = {module: name for name, module in pruned.named_modules()}
    attentions = [m for m in pruned.modules() if _heads(m)]
    readers = {r: m for m in attentions for r in (getattr(m, n, None) for n in READERS) if isinstance(r, nn.Module)}
    layers = [m for m in pruned.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    readers = {layer: m for layer, m in readers.items() if layer in set(layers)}
    hidden = {m for name, m in pruned.named_modules() if name.endswith(HIDDEN)}
    widths = {m: sum(r.weight.shape[0] for r, owner in readers.items() if owner is m) for m in attentions}
    pruner = tp.pruner.BasePruner(
        pruned,
        (inputs,) if isinstance(inputs, Tensor) else inputs,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=ratio,
        num_heads={layer: _heads(m) for layer, m in readers.items()},
        head_pruning_ratio=ratio,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[layer for layer in layers if layer not in readers and layer not in hidden],
    )
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            reads = dep.handler in (tp.prune_linear_in_channels, tp.prune_conv_in_channels)
            if reads and dep.target.module in names:
                layer: Any = zeroed.get_submodule(names[dep.target.module])
                layer.weight.data[:, list(idxs)] = 0
        group.prune()
    for module, width in widths.items():
        left = sum(r.weight.shape[0] for r, owner in readers.items() if owner is module)
        for count in COUNTS if width else ():
            if isinstance(getattr(module, count, None), int):
                setattr(module, count, max(1, getattr(module, count) * left // width))
    return pruned, zeroed
