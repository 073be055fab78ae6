"""What several files of tests look at: a real run, taken once."""

import pytest
import torch

import xprune
from tests.support.models import build, loader


@pytest.fixture(scope="session")
def result():
    criterion = xprune.CRITERIA["xpruner"](steps=6)
    selection = xprune.LearnedThresholds(steps=6)
    budget = xprune.Budget(macs=0.6)
    pruner = xprune.Pruner(build("vit"), criterion, budget, selection, xprune.Finetune(epochs=4))
    return pruner.run(loader(32), loader(32))


WAYS = {
    "old": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "new": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "new for all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    "new for convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "old, off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "as it starts": lambda: None,
}
"""Ways in which a caller may have said how exact float32 products are to be."""


@pytest.fixture
def precision_settings():
    """Sets what one of WAYS says; everything is as torch starts with it, as far as it can be set, afterwards."""

    def use(way):
        WAYS[way]()

    yield use
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    for setting in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        setting.fp32_precision = "none"
