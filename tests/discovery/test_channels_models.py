"""Tests residual channels in models whose streams pass through more than plain layers."""

import pytest
import torch
from torch import nn

import xprune
from tests.support.models import CLASSES, images
from tests.support.timm_hybrid_models import TIMM_HYBRID_MODELS
from xprune.core.plan import Plan
from xprune.modules.norms import weighted_norm
from xprune.testing import check_adapter, perturb

CHANNELS = ("channel",)


def torch_encoder(norm_first):
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 12), encoder, nn.Linear(12, 5))


def mixer(block, **settings):
    from timm.models import mlp_mixer

    made = getattr(mlp_mixer, block)
    return mlp_mixer.MlpMixer(CLASSES, 16, patch_size=8, num_blocks=1, embed_dim=24, block_layer=made, **settings)


def cait():
    from timm.models.cait import Cait

    return Cait(16, 8, num_classes=CLASSES, embed_dim=12, depth=1, num_heads=3, depth_token_only=1)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 1, 2, 12, 16, num_classes=CLASSES)


def inception():
    from timm.models.inception_next import MetaNeXt

    return MetaNeXt(num_classes=CLASSES, depths=(1, 1), dims=(16, 24))


class Grouped(nn.Module):
    """A stream with a grouped convolution, a strided and a transposed one, and outputs that are concatenated."""

    def __init__(self, parts=(12,)):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 12, 2, 2), nn.BatchNorm2d(12), nn.Linear(12, CLASSES)
        self.grouped, self.join = nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.Conv2d(12, 12, 1)
        self.down, self.up = nn.Conv2d(12, 5, 2, 2), nn.ConvTranspose2d(5, 12, 2, 2)
        self.parts = nn.ModuleList(nn.Conv2d(12, part, 1) for part in parts)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x + self.join(self.grouped(x).relu())
        x = x + self.up(self.down(x).relu())
        x = x + torch.cat([part(x) for part in self.parts], 1)
        return self.head(x.mean((2, 3)))


def hugging_face(family):
    pytest.importorskip("transformers")
    from benchmarks.hugging_face_models import MODELS

    return MODELS[f"hf {family}"]()


PICTURES = {
    "mixer": lambda: mixer("MixerBlock"),
    "resmlp, norms without statistics": lambda: mixer("ResBlock", mlp_ratio=4),
    "heads that talk": cait,
    "torchvision": torchvision_vit,
    "parts of the channels": inception,
    "groups": Grouped,
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    torch.manual_seed(0)
    assert check_adapter(perturb(PICTURES[name]()), images(2)[..., :16, :16], seeds=range(1), units=CHANNELS)


def test_groups_and_parts_that_tie_all_channels_are_refused():
    with pytest.raises(xprune.ModelError, match="all of them would go together"):
        xprune.find_sites(perturb(Grouped((6, 6))), images(2), units=CHANNELS)


def test_attention_with_convolutions_over_positions():
    build, size, _ = TIMM_HYBRID_MODELS["coat"]
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    assert check_adapter(perturb(build()), x, seeds=range(1), units=CHANNELS)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma", "segformer"])
def test_hugging_face(family):
    model, inputs = hugging_face(family)
    assert check_adapter(perturb(model), inputs, seeds=range(1), units=CHANNELS)


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_counts_what_is_left(norm_first):
    model, x = perturb(torch_encoder(norm_first)), torch.randn(2, 4, 6)
    (site,) = check_adapter(model, x, seeds=range(1), units=CHANNELS)
    attention = xprune.apply(model, Plan((site,), ((0, 2, 5, 7, 11),)), x)[1].layers[0].self_attn
    assert attention.embed_dim == attention.kdim == attention.vdim == 5
    assert attention.in_proj_weight.shape == (36, 5) and attention.in_proj_bias.shape == (36,)


def test_mlps_over_tokens_keep_their_weights():
    torch.manual_seed(0)
    model, x = perturb(mixer("MixerBlock")), images(2)[..., :16, :16]
    site = next(s for s in xprune.find_sites(model, x, units=CHANNELS) if s.size == 24)
    pruned = xprune.apply(model, Plan((site,), (tuple(range(7)),)), x)
    assert pruned.blocks[0].mlp_tokens.fc1.weight.shape == model.blocks[0].mlp_tokens.fc1.weight.shape
    assert pruned.blocks[0].mlp_channels.fc1.in_features == 7


class OffsetRMSNorm(nn.Module):
    """The RMSNorm of Gemma: it scales by 1 + weight, and its eps has an unusual name."""

    def __init__(self, features):
        super().__init__()
        self.weight, self.tiny = nn.Parameter(torch.randn(features)), 1e-3

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.tiny) * (1 + self.weight)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_any_rmsnorm_takes_its_statistic_from_those_kept(scale):
    norm, x, keep = OffsetRMSNorm(6), scale * torch.randn(3, 6), [0, 2, 5]
    weight, small = torch.zeros(1, 6), OffsetRMSNorm(3)
    weight[:, keep] = 1
    small.weight.data = norm.weight[keep]
    torch.testing.assert_close(weighted_norm(norm, x, weight)[:, keep], small(x[:, keep]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weighted_norm(norm, x, torch.ones(1, 6)), norm(x))
