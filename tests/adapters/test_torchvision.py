"""Tests pruning of torchvision's models and the classes that replace their attentions in the gated model."""

import itertools

import pytest
import torch
from torch import nn
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2, SwinTransformerBlockV2

import xprune
from tests.adapters.test_torch_nn import outputs, swapped
from xprune.adapters.torchvision_forwards import WindowAttention, WindowAttentionV2
from xprune.core.plan import Plan
from xprune.testing import check_adapter, check_exact, perturb


@pytest.mark.parametrize("ours", [WindowAttention, WindowAttentionV2])
@pytest.mark.parametrize("bias", [True, False])
def test_window_attention_is_torchvisions(ours, bias):
    theirs = ShiftedWindowAttentionV2 if ours is WindowAttentionV2 else ShiftedWindowAttention
    torch.manual_seed(0)
    for size, shift, training in itertools.product([(8, 8), (7, 10), (4, 9), (3, 3)], [[0, 0], [2, 2]], [True, False]):
        module = perturb(theirs(8, [4, 4], shift, 2, bias, bias, 0.2, 0.2), scale=0.3).train(training)
        x = torch.randn(2, *size, 8)
        expected = outputs(module, (x,), {})
        torch.testing.assert_close(outputs(swapped(module, ours), (x,), {}), expected)


SWIN = {
    "patch_size": [2, 2],
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [4, 4],
    "mlp_ratio": 1.0,
}
VISION = {
    "torch-attention": lambda: VisionTransformer(32, 8, 2, 3, 24, 32, num_classes=5),
    "torchvision-swin": lambda: SwinTransformer(**SWIN, num_classes=5),
    "torchvision-swinv2": lambda: SwinTransformer(**SWIN, num_classes=5, block=SwinTransformerBlockV2),
}


@pytest.mark.parametrize("adapter", VISION)
def test_torchvision(adapter):
    torch.manual_seed(0)
    model = perturb(VISION[adapter]())
    if adapter == "torch-attention":
        # The classifier starts at zero, which would hide every mistake before it.
        nn.init.normal_(model.heads.head.weight, std=0.1)
    sites = check_adapter(model, torch.randn(2, 3, 32, 32), adapter=adapter, seeds=range(2))
    assert {site.kind for site in sites} == {"head", "neuron"}


def test_heads_of_torchvisions_maxvit():
    torch.manual_seed(0)
    model, x = perturb(MaxVit((32, 32), 8, 4, [16], [1], 4, 0.0, num_classes=5)), torch.randn(2, 3, 32, 32)
    sites = xprune.find_sites(model, x, units=["head"])
    assert [site.adapter for site in sites] == ["torchvision-maxvit"] * 2
    for keeps in (((0, 2), (1,)), ((), (3,)), ((1, 2, 3), ())):
        check_exact(model, Plan(sites, keeps), x)
