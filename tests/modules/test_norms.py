"""Tests norms with a weight for each feature: with weights of 0 and 1, only the kept features are normalised."""

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn

import xprune
from xprune.modules.norms import feature_axis, is_feature_norm, weighted_norm
from xprune.testing import perturb

FEATURES = 6


class RMSNormOfALibrary(nn.Module):
    """An RMSNorm with another name for eps, and a weight that is added to 1."""

    def __init__(self, features):
        super().__init__()
        self.scale, self.variance_epsilon = nn.Parameter(torch.zeros(features)), 1e-6

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return x * (1 + self.scale)


# Name -> (a function that builds a norm of so many features, shape of its input).
NORMS = {
    "layer norm": (nn.LayerNorm, (2, 5, FEATURES)),
    "layer norm, no weight": (lambda n: nn.LayerNorm(n, elementwise_affine=False), (2, 5, FEATURES)),
    "layer norm, no bias": (lambda n: nn.LayerNorm(n, bias=False), (2, 5, FEATURES)),
    "rms norm": (nn.RMSNorm, (2, 5, FEATURES)),
    "rms norm of a library": (RMSNormOfALibrary, (2, 5, FEATURES)),
    "group norm of one group": (lambda n: nn.GroupNorm(1, n), (2, FEATURES, 3, 4)),
    "response norm": (GlobalResponseNorm, (2, 3, 4, FEATURES)),
    "response norm of maps": (lambda n: GlobalResponseNorm(n, channels_last=False), (2, FEATURES, 3, 4)),
}


def made(name):
    make, shape = NORMS[name]
    torch.manual_seed(0)
    return perturb(make(FEATURES)), torch.randn(shape) + 0.5


def along(weight, norm, x):
    """Returns a weight (features,) for each sample, with the features on the axis of the norm."""
    shape = [1] * x.dim()
    shape[feature_axis(norm)] = len(weight)
    return weight.view(shape).expand(len(x), *shape[1:])


def kept_norm(name, norm, keep):
    """Returns the slow reference: a norm over the kept features, with their weights."""
    small = NORMS[name][0](len(keep))
    with torch.no_grad():
        for key, parameter in small.named_parameters():
            parameter.copy_(dict(norm.named_parameters())[key][keep])
    return small


@pytest.mark.parametrize("name", NORMS)
def test_weights_of_one_change_nothing(name):
    norm, x = made(name)
    got = weighted_norm(norm, x, along(torch.ones(FEATURES), norm, x))
    torch.testing.assert_close(got, norm(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", [[0, 2, 3], [1], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("name", NORMS)
def test_weights_of_zero_are_features_that_are_gone(name, keep):
    norm, x = made(name)
    axis = feature_axis(norm)
    weight = torch.zeros(FEATURES)
    weight[keep] = 1
    got = weighted_norm(norm, x, along(weight, norm, x)).index_select(axis, torch.tensor(keep))
    expected = kept_norm(name, norm, keep)(x.index_select(axis, torch.tensor(keep)))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_a_row_is_weighted_by_its_own_weights(name):
    norm, x = made(name)
    rows = torch.rand(len(x), FEATURES).clamp_min(0.1)
    shape = [len(x), *([1] * (x.dim() - 1))]
    shape[feature_axis(norm)] = FEATURES
    together = weighted_norm(norm, x, rows.view(shape))
    for index in range(len(x)):
        one = slice(index, index + 1)
        torch.testing.assert_close(together[one], weighted_norm(norm, x[one], rows.view(shape)[one]))


@pytest.mark.parametrize("name", NORMS)
def test_no_feature_at_all_gives_numbers_still(name):
    norm, x = made(name)
    assert weighted_norm(norm, x, along(torch.zeros(FEATURES), norm, x)).isfinite().all()


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, FEATURES), nn.BatchNorm1d(FEATURES), nn.Identity()])
def test_a_norm_that_is_not_known_is_refused_by_its_class(norm):
    assert not is_feature_norm(norm)
    with pytest.raises(xprune.GateError, match=type(norm).__name__):
        weighted_norm(norm, torch.zeros(2, FEATURES), torch.ones(2, FEATURES))
