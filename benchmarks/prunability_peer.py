"""Runs the pruner of torch-pruning, without xprune, for `benchmarks.prunability`.

BasePruner gets the numbers of heads, and one ratio for heads and neurons. The ratio is searched. Attributes that hold
the number of heads are corrected by hand after pruning, since many models would not run otherwise.

The pruned model is exact if it equals the dense model in which weights are zero: the columns of each consumer that
belong to removed units.
"""

import copy
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import xprune
from xprune.modules.calls import call, tensors_in

# Steps of the search for the smallest ratio that meets the budget.
HALVINGS = 5
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
HEAD_ATTRIBUTES = (
    *HEADS,
    "attn_dim",
    "attention_dim",
    "dim_out",
    "out_dim",
    "key_attn_dim",
    "val_attn_dim",
    "all_head_size",
)
"""Names of attributes that hold the number of heads or a multiple of it."""
# Names of producers, as libraries have them: layers of attentions, and first layers of MLPs.
ATTENTION_PRODUCERS = (
    "qkv",
    "q",
    "k",
    "v",
    "kv",
    "query",
    "key",
    "value",
    "q_proj",
    "k_proj",
    "v_proj",
    "q_lin",
    "k_lin",
    "v_lin",
)
MLP_PRODUCERS = (
    "fc1",
    "fc1_g",
    "fc1_x",
    "linear1",
    "mlp.0",
    "intermediate.dense",
    "gate_proj",
    "up_proj",
    "lin1",
    "c_fc",
)


def _heads(module: nn.Module) -> int:
    """Returns the number of heads in the attributes of a module, or 0 if there is none."""
    found = [getattr(module, name, None) for name in HEADS]
    return next((count for count in found if isinstance(count, int)), 0)


def by_torch_pruning(model: nn.Module, inputs: Any, asked: float) -> dict[str, Any]:
    """Prunes with the smallest ratio that meets the budget, or with the first that was tried if none does."""
    if hasattr(model, "config"):
        # The tracer of torch-pruning cannot handle the cache of a language model.
        model.config.use_cache = False
    dense = xprune.count_macs(model, inputs)
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        found = _at_ratio(model, inputs, ratio)
        got = xprune.count_macs(found[0], inputs) / dense
        if got <= asked:
            high, best = ratio, (*found, got)
        else:
            low, best = ratio, best or (*found, got)
    assert best is not None
    pruned, zeroed, got = best
    with torch.no_grad():
        expected, out = (tensors_in(call(m.eval(), inputs))[0] for m in (zeroed, pruned))
    error = float((expected - out).abs().max() / expected.abs().max().clamp_min(1.0))
    return {"sites": "", "asked": asked, "hit": got, "error": error}


def _at_ratio(model: nn.Module, inputs: Any, ratio: float) -> tuple[nn.Module, nn.Module]:
    """Returns the pruned model, and the dense model with zeros in the columns that belong to removed units."""
    pruned, zeroed = copy.deepcopy(model).eval().requires_grad_(True), copy.deepcopy(model).eval()
    names = {module: name for name, module in pruned.named_modules()}
    attentions = [m for m in pruned.modules() if _heads(m)]
    producers = {
        r: m for m in attentions for r in (getattr(m, n, None) for n in ATTENTION_PRODUCERS) if isinstance(r, nn.Module)
    }
    layers = [m for m in pruned.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    producers = {layer: m for layer, m in producers.items() if layer in set(layers)}
    hidden = {m for name, m in pruned.named_modules() if name.endswith(MLP_PRODUCERS)}
    rows = {m: sum(r.weight.shape[0] for r, owner in producers.items() if owner is m) for m in attentions}
    pruner = tp.pruner.BasePruner(
        pruned,
        (inputs,) if isinstance(inputs, Tensor) else inputs,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=ratio,
        num_heads={layer: _heads(m) for layer, m in producers.items()},
        head_pruning_ratio=ratio,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[layer for layer in layers if layer not in producers and layer not in hidden],
    )
    # Interactive: each group of slices is seen before it is cut, while indices still fit the dense model.
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            is_consumer = dep.handler in (tp.prune_linear_in_channels, tp.prune_conv_in_channels)
            if is_consumer and dep.target.module in names:
                layer: Any = zeroed.get_submodule(names[dep.target.module])
                layer.weight.data[:, list(idxs)] = 0
        group.prune()
    # What is left of the rows of the producers says what is left of the heads.
    for module, before in rows.items():
        after = sum(r.weight.shape[0] for r, owner in producers.items() if owner is module)
        for name in HEAD_ATTRIBUTES if before else ():
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, max(1, getattr(module, name) * after // before))
    return pruned, zeroed
