"""Tests pruning of nn.TransformerEncoder and nn.TransformerDecoder, also on PyTorch's fast path for inference."""

import pytest
import torch
from torch import nn

import xprune
from xprune.adapters.torch_nn import HeadedAttention
from xprune.core.plan import Plan
from xprune.testing import check_adapter, check_criterion, perturb, random_plan


def encoder(batch_first=True, **kwargs):
    layer = nn.TransformerEncoderLayer(16, 4, 12, batch_first=batch_first, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not kwargs)


class Encoder(nn.Module):
    """Classifies the mean of the tokens. Its input is batch-first, also if the encoder takes tokens first."""

    def __init__(self, batch_first=True, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        self.encoder, self.head = encoder(batch_first, **kwargs), nn.Linear(16, 3)
        perturb(self)

    def forward(self, x, padding=None):
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1 if self.batch_first else 0))


PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"norm_first": True}, {"activation": "gelu", "bias": False}])
def test_encoder_layers(batch_first, kwargs):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    for inputs in (x, (x, PADDING)):
        sites = check_adapter(Encoder(batch_first, **kwargs), inputs, adapter="torch-attention", seeds=range(2))
        assert [site.kind for site in sites] == ["head", "neuron"] * 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("gone", [None, 0])
def test_a_padded_batch_on_the_inference_path(gone):
    """nn.TransformerEncoder packs a padded batch into a nested tensor, and not every pruned layer can take one."""
    model, x = Encoder(), torch.randn(2, 5, 16)
    sites = xprune.find_sites(model, (x, PADDING))
    keeps = [tuple(range(site.size)) for site in sites]
    # The first layer is not cut, so it keeps the fast path.
    keeps[2] = () if gone is None else (1, 3)
    pruned = xprune.apply(model, Plan(sites, tuple(keeps)), (x, PADDING))
    with torch.no_grad():
        packed = pruned.encoder(x, src_key_padding_mask=PADDING)
    assert not packed[PADDING].any(), "the batch was not packed"
    with torch.enable_grad():
        slow = pruned.encoder(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(packed[~PADDING], slow[~PADDING])


@pytest.mark.parametrize("batch_first", [True, False])
def test_each_sample_has_its_own_gates_wherever_its_axis_is(batch_first):
    model, x = Encoder(batch_first), torch.randn(4, 5, 16)
    sites = xprune.find_sites(model, x[:2])
    assert [site.batch for site in sites] == [0, 0 if batch_first else 1] * 2
    rows = [torch.rand(4, site.size) for site in sites]
    with xprune.Gates(sites, rows).attached(model), torch.no_grad():
        together = model(x)
    for index in range(4):
        with xprune.Gates(sites, [row[index] for row in rows]).attached(model), torch.no_grad():
            torch.testing.assert_close(together[index], model(x[index : index + 1])[0])


@pytest.mark.parametrize("criterion", ["taylor", "magnitude", "captum:IntegratedGradients"])
def test_pruned_by_a_criterion_to_a_budget(criterion):
    x, y = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    model = Encoder(batch_first=False)
    check_criterion(criterion, model, [(x, y)])
    result = xprune.Pruner(model, criterion, xprune.Budget(macs=0.5), finetune=None).run([(x, y)])
    macs = [xprune.count_macs(m, x[:2]) for m in (model, result.model)]
    assert 0.4 < macs[1] / macs[0] <= 0.5


def test_decoder_layers_self_and_cross():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 12, batch_first=True), 2)

        def forward(self, x, memory):
            return self.decoder(x, memory, tgt_mask=torch.ones(3, 3).triu(1).bool(), tgt_is_causal=True)

    x, memory = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    sites = check_adapter(perturb(Decoder()), (x, memory), adapter="torch-attention")
    assert [site.name.rpartition(".")[2] for site in sites] == ["self_attn", "multihead_attn", "linear2"] * 2


def test_the_gated_class_is_held_to_the_plain_one(monkeypatch):
    """A mistake that the gated and the pruned model share would not show when they are compared."""
    project = HeadedAttention._project

    def wrong(self, *args):
        q, k, v = project(self, *args)
        return [q * 2, k, v]

    model, x = Encoder(), torch.randn(2, 5, 16)
    sites = xprune.find_sites(model, x)
    monkeypatch.setattr(HeadedAttention, "_project", wrong)
    with pytest.raises(xprune.SurgeryError, match="self_attn"):
        xprune.apply(model, random_plan(sites, 0), x)
