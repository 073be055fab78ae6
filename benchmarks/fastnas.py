"""Runs NVIDIA ModelOpt's FastNAS as a second library to compare with in `benchmarks.proof`.

FastNAS searches the number of neurons of each MLP. It removes no heads. Install it in a separate environment:

    pip install nvidia-modelopt torchprofile==0.0.4 requests omegaconf nvidia-ml-py
"""

import copy
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import xprune
from xprune.comparison.grid import Case, Peer

BATCHES = 5


def fastnas_peers() -> dict[str, Peer]:
    """Returns the pruner under its name in the table, or nothing if ModelOpt is not installed."""
    return {"ModelOpt FastNAS, MLPs": _prune} if find_spec("modelopt") else {}


def _prune(case: Case, budget: xprune.Budget, seed: int) -> nn.Module:
    """Prunes with FastNAS, which chooses by accuracy on training batches. The result costs at most the budget.

    FastNAS counts FLOPs, which are twice the MACs, and it does not count fused attention. Since it does not prune
    attention either, the cost to remove is the same in both counts. So the limit is the dense model's FLOPs in its
    count, minus twice the MACs to remove.
    """
    import modelopt.torch.prune as mtp
    from modelopt.torch.nas.utils import inference_flops

    torch.manual_seed(seed)
    few: list[Any] = [batch for _, batch in zip(range(BATCHES), case.train, strict=False)]
    model, example = copy.deepcopy(case.model), few[0][0][:1]
    removed_macs = (1 - (budget.macs or 1.0)) * xprune.count_macs(case.model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {
            "data_loader": few,
            "collect_func": lambda batch: batch[0],
            "score_func": lambda candidate: xprune.evaluate(candidate, few).metric,
            "checkpoint": None,
            "verbose": False,
        }
        limit = {"flops": inference_flops(model, example, unit=1) - 2 * removed_macs}
        found, _ = mtp.prune(model, mode="fastnas", constraints=limit, dummy_input=example, config=config)
    if xprune.count_macs(found, example) > (budget.macs or 1.0) * xprune.count_macs(case.model, example):
        raise RuntimeError(f"FastNAS found a model that costs more than {budget}.")
    return found
