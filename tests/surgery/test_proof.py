"""Tests that the proof refuses wrong cuts and accepts exact ones, for outputs of every form."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import xprune
from tests.support import proof_models
from tests.support.models import build, images
from tests.support.proof_models import HONEST, PLAN, RANDOM, WRONG, inputs
from xprune.adapters import ADAPTERS
from xprune.modules.copies import shared_copy
from xprune.modules.precision import exact_arithmetic
from xprune.surgery import exactness
from xprune.surgery import outputs as outputs_of_models
from xprune.surgery.cut import remove_units
from xprune.testing import assert_untouched, check_exact, random_plan, snapshot

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def problem(model, x, plan=PLAN):
    return exactness.problem(model, remove_units(shared_copy(model), plan, ADAPTERS), plan, x)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_cuts_are_refused(name):
    model, x = proof_models.build(WRONG[name]), inputs()
    before = snapshot(model)
    assert problem(model, x)
    for in_place in (False, True):
        with pytest.raises(xprune.SurgeryError, match=r"hidden \(3 of 6.*untouched"):
            xprune.apply(model, PLAN, x, in_place=in_place)
    assert_untouched(model, before)
    assert torch.equal(x, inputs()) and not model.plain.any() and not model.kept.state["last"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HONEST)
def test_exact_cuts_pass(name, dtype):
    model = proof_models.build(HONEST[name]).to(dtype)
    before = snapshot(model)
    pruned = xprune.apply(model, PLAN, inputs().to(dtype))
    assert_untouched(model, before)
    assert pruned.fc1.weight.shape == (3, 8) and pruned.fc1.weight.dtype == dtype
    assert pruned.seen == 0, "the proof left something behind in the pruned model"


@pytest.mark.parametrize("name", RANDOM)
def test_what_cannot_be_compared_is_refused_by_its_name(name):
    finish, said = RANDOM[name]
    with pytest.raises(xprune.SurgeryError, match=said) as refused:
        xprune.apply(proof_models.build(finish), PLAN, inputs())
    assert "exclude" not in str(refused.value)
    assert problem(proof_models.build(finish), inputs())


def test_weights_that_are_not_numbers_are_named():
    model = proof_models.build(HONEST["plain"])
    with torch.no_grad():
        model.stem.weight[0, 0] = torch.nan
    with pytest.raises(xprune.SurgeryError, match=r"the dense model itself gives NaN.*stem\.weight holds NaN"):
        xprune.apply(model, PLAN, inputs())


def test_the_callers_random_numbers_are_not_touched():
    model = proof_models.build(HONEST["noise of its own"])
    state = torch.get_rng_state()
    xprune.apply(model, PLAN, inputs())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pruned_model_may_have_nothing_left_to_remember():
    """A removed module keeps no cache. Both models are called twice and give the same each time."""

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2, self.cache = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), {}

        def forward(self, x):
            self.cache.setdefault(x.device, self.fc1.bias * 1)
            return self.fc2(self.act(x @ self.fc1.weight.T + self.cache[x.device]))

    torch.manual_seed(0)
    model = nn.Sequential(Caching(), nn.Linear(8, 3))
    cuts = (xprune.Cut("0.fc1.weight", 0), xprune.Cut("0.fc1.bias", 0), xprune.Cut("0.fc2.weight", 1))
    site = xprune.Site("0", "neuron", 6, 1, ("0.fc2",), cuts=cuts, module="0")
    for keep in ((), (1, 4)):
        assert problem(model, inputs(), xprune.Plan((site,), (keep,))) is None


def test_each_output_has_its_own_size():
    """A difference must not pass because another output is larger, or because it is smaller than 1."""
    for scale in (1e-6, 1.0, 1e6):
        model = proof_models.build(
            lambda m, x, h, y, scale=scale: (scale * y + 1e-3 * scale * h.mean(-1, True), 1e9 * y)
        )
        assert "in its output [0]" in problem(model, inputs())


def test_a_model_whose_gates_change_nothing_is_told():
    assert not exactness.changes(
        outputs_of_models.Runs(proof_models.build(lambda m, x, h, y: 0 * y + x), inputs()), PLAN
    )
    assert exactness.changes(outputs_of_models.Runs(proof_models.build(HONEST["tiny"]), inputs()), PLAN)
    assert exactness.changes(
        outputs_of_models.Runs(proof_models.build(lambda m, x, h, y: x + 1e-8 * y), inputs()), PLAN
    )


def rounded(tensor):
    """Rounds a tensor to the 10 bits of mantissa that TF32 keeps."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
        return tensor
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32(monkeypatch):
    """Makes products and convolutions round like a GPU, if the caller's settings allow TF32."""

    def rounding(function, allowed):
        def run(*args, **kwargs):
            if allowed():
                args = [rounded(arg) for arg in args]
            return function(*args, **kwargs)

        return run

    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    for owner, name, setting in (
        (F, "linear", matmul),
        (torch, "matmul", matmul),
        (F, "scaled_dot_product_attention", matmul),
        (F, "conv2d", conv),
    ):
        function = rounding(getattr(owner, name), lambda setting=setting: setting.fp32_precision == "tf32")
        monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("way", ["old", "matmul precision", "new", "new for all", "convolutions"])
def test_tf32_is_put_aside(way, tf32, precision_settings):
    model, x = build("vit"), images()
    with exact_arithmetic():
        exact = model(x)
    sites = xprune.find_sites(model, x)
    precision_settings(way)
    assert not torch.allclose(model(x), exact, rtol=1e-5, atol=1e-6), "the emulation does nothing"
    pruned = xprune.apply(model, random_plan(sites, 0), x)
    assert not torch.allclose(pruned(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_it(dtype):
    model, x = build("swin").to(dtype), images().to(dtype)
    sites = xprune.find_sites(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pruned = xprune.apply(model, random_plan(sites, 0), x)
        assert torch.is_autocast_enabled("cpu")
    assert {p.dtype for p in pruned.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(dtype):
    model, x = proof_models.build(lambda m, x, h, y: y + torch.ones(8) / 3), inputs()
    torch.set_default_dtype(dtype)
    try:
        pruned = xprune.apply(model, PLAN, x)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert pruned.fc1.weight.dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_the_result_can_be_trained_whatever_the_mode_around_it(mode):
    model, x = build("vit"), images()
    sites = xprune.find_sites(model, x)
    with mode():
        pruned = xprune.apply(model, random_plan(sites, 0, gone=0), x)
    pruned(x).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


class Attends(nn.Module):
    """Operations of libraries that are difficult at another dtype: fused biases, masks, weights used directly."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(10, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.qkv, self.q_bias = nn.Linear(8, 24, bias=False), nn.Parameter(torch.randn(8))
        self.table = nn.Parameter(torch.randn(4, 4))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.q_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        mask = torch.zeros(4, 4, dtype=x.dtype).masked_fill(torch.ones(4, 4).triu(1).bool(), torch.finfo(x.dtype).min)
        x = x + F.scaled_dot_product_attention(q, k, v, mask + self.table)
        x = (
            x
            + F.scaled_dot_product_attention(q, k, v, self.table.tril())
            + torch.einsum("bnc,cd->bnd", q, self.table.repeat(2, 2))
        )
        x = x + self.attention(x, x, x)[0]
        return x + self.mlp(x)


def test_low_precision_models_run_without_a_copy(monkeypatch):
    torch.manual_seed(0)
    model, ids = Attends().to(torch.bfloat16).eval(), torch.arange(8).view(2, 4)
    sites = xprune.find_sites(model, ids)
    assert [site.kind for site in sites] == ["head", "neuron"]
    monkeypatch.setattr(outputs_of_models, "fill", lambda *_: pytest.fail("a copy was converted"))
    for seed in range(3):
        assert check_exact(model, random_plan(sites, seed), ids) < 1e-4
    assert all(t.dtype == torch.float32 for t in exactness.gated_outputs(model, random_plan(sites, 0), ids))


def test_low_precision_models_that_cannot_be_lifted_are_converted():
    """An LSTM checks dtypes itself, and a buffer that is written to would have to be rounded."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc1, self.fc2 = nn.LSTM(8, 8), nn.Linear(8, 6), nn.Linear(6, 8)
            self.register_buffer("last", torch.zeros(8))

        def forward(self, x):
            x = self.lstm(x)[0]
            self.last.copy_(x[0, 0])
            return self.fc2(F.relu(self.fc1(x))) + self.last

    torch.manual_seed(0)
    model, x = Recurrent().to(torch.bfloat16).eval(), torch.randn(3, 2, 8).to(torch.bfloat16)
    before = snapshot(model)
    pruned = xprune.apply(model, PLAN, x)
    assert_untouched(model, before)
    assert pruned.fc1.weight.dtype == torch.bfloat16
    assert problem(model, x) is None


class Remembers(nn.Module):
    """A layer whose output grows with each call, as that of a decoder with a cache does."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), []

    def forward(self, x):
        self.calls.append(None)
        return self.layer(x) * len(self.calls)


def test_each_forward_of_a_model_that_remembers_starts_anew():
    model, x = Remembers(), torch.randn(2, 4)
    runs = outputs_of_models.Runs(model, x)
    first, second = runs.dense(), runs.dense()
    assert first.keys() == second.keys() == {"", "of the second call"} and not model.calls
    assert torch.equal(first[""], model.layer(x)) and all(torch.equal(first[name], second[name]) for name in first)


def test_outputs_of_the_last_plans_are_kept(monkeypatch):
    model = proof_models.build(HONEST["tiny"])
    runs, made = outputs_of_models.Runs(model, inputs()), []
    original = outputs_of_models.Runs._run
    monkeypatch.setattr(
        outputs_of_models.Runs, "_run", lambda self, *given: made.append(given) or original(self, *given)
    )
    size = PLAN.sites[0].size
    plans = [xprune.Plan(PLAN.sites, ((unit,),)) for unit in range(min(size, outputs_of_models.KEPT))]
    for plan in (*plans, *plans):
        found = runs.gated(plan)
        again = outputs_of_models.Runs(model, inputs()).gated(plan)
        assert all(torch.equal(found[name], again[name]) for name in again)
    # One run for each plan, and one for each of the `Runs` made to compare.
    assert len(made) == len(plans) + 2 * len(plans)
