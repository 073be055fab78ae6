"""A second peer: NVIDIA ModelOpt's FastNAS, which searches widths of MLPs and leaves heads alone.

It needs an environment of its own: pip install nvidia-modelopt torchprofile==0.0.4 requests omegaconf nvidia-ml-py
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
    """The peer under its name, or nothing where ModelOpt is not installed."""
    return {"ModelOpt FastNAS, MLPs": _prune} if find_spec("modelopt") else {}


def _prune(case: Case, budget: xprune.Budget, seed: int) -> nn.Module:
    """Searched by accuracy on training batches, at the cost that leaves the MACs asked.

    It counts FLOPs, twice the MACs, and leaves out fused attention, which it does not prune: what has to go is the
    same by either count.
    """
    import modelopt.torch.prune as mtp
    from modelopt.torch.nas.utils import inference_flops

    torch.manual_seed(seed)
    few: list[Any] = [batch for _, batch in zip(range(BATCHES), case.train, strict=False)]
    model, example = copy.deepcopy(case.model), few[0][0][:1]
    gone = (1 - (budget.macs or 1.0)) * xprune.count_macs(case.model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {
            "data_loader": few,
            "collect_func": lambda batch: batch[0],
            "score_func": lambda candidate: xprune.evaluate(candidate, few).metric,
            "checkpoint": None,
            "verbose": False,
        }
        limit = {"flops": inference_flops(model, example, unit=1) - 2 * gone}
        found, _ = mtp.prune(model, mode="fastnas", constraints=limit, dummy_input=example, config=config)
    if xprune.count_macs(found, example) > (budget.macs or 1.0) * xprune.count_macs(case.model, example):
        raise RuntimeError(f"FastNAS: what it found costs more than {budget}.")
    return found
