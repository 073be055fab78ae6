"""Tests that proofs compute in full precision, and put the caller's settings back."""

import pytest
import torch
from torch import nn

from tests.support.precision import WAYS
from xprune.modules import precision
from xprune.modules.precision import CannotLift, exact_arithmetic, lifted


def read(get):
    """A setting, or that reading it fails, as it does where old and new settings disagree."""
    try:
        return get()
    except RuntimeError:
        return "they disagree"


def settings():
    """All that torch says about the exactness of float32, each setting by its name."""
    backends = torch.backends
    new = {
        f"{b}.{op}": lambda b=b, op=op: precision.get_precision(b, op)
        for b, op in (*precision._PARENTS, *precision._LEAVES)
    }
    matmul = {
        name: lambda name=name: getattr(backends.cuda.matmul, name)
        for name in (
            "allow_tf32",
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
            "allow_fp16_accumulation",
        )
    }
    other = {
        "cudnn": lambda: backends.cudnn.allow_tf32,
        "precision": torch.get_float32_matmul_precision,
        "math attention": backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
        "default dtype": torch.get_default_dtype,
        "gradients": torch.is_grad_enabled,
        "inference": torch.is_inference_mode_enabled,
        "autocast": lambda: torch.is_autocast_enabled("cpu"),
    }
    return {name: read(get) for name, get in {**new, **matmul, **other}.items()}


def under(parents):
    """What the settings of operations come to once settings above them are changed."""
    found = []
    for value in parents:
        torch.backends.fp32_precision = value
        found.append({key: precision.get_precision(*key) for key in precision._LEAVES})
    torch.backends.fp32_precision = "none"
    return found


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_everything_is_put_back(way, fails, precision_settings):
    precision_settings(way)
    before = settings()
    try:
        with exact_arithmetic():
            assert {precision.get_precision(*key) for key in precision._LEAVES} == {"ieee"}
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
            if way in ("convolutions", "old, off"):  # set by the old setting, which can then be read
                assert not torch.backends.cudnn.allow_tf32
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert settings() == before


@pytest.mark.parametrize("way", WAYS)
def test_settings_that_were_inherited_still_are(way, precision_settings):
    precision_settings(way)
    if way == "new for all":
        torch.backends.fp32_precision = "none"
    before = under(("tf32", "ieee"))
    with exact_arithmetic():
        pass
    assert under(("tf32", "ieee")) == before


def test_a_context_around_it_is_put_aside():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        before = settings()
        with exact_arithmetic(torch.float64):
            layer = nn.Linear(2, 2)
            made = layer(torch.ones(1, 2))
            assert made.dtype == torch.float64 and not made.requires_grad and not made.is_inference()
        assert settings() == before
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16


def test_half_precision_sums_are_put_back():
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with exact_arithmetic():
            assert not matmul.allow_fp16_reduced_precision_reduction
        assert matmul.allow_fp16_reduced_precision_reduction
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("part", [1, 64, precision.PART])
def test_lifted_is_what_a_converted_copy_gives(narrow, wanted, part, monkeypatch):
    monkeypatch.setattr(precision, "PART", part)
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 3, bias=False)
    )
    model, ids = layers.to(narrow), torch.arange(7).view(1, 7)
    with torch.no_grad(), lifted(wanted):
        got = model(ids)
    assert got.dtype == wanted
    torch.testing.assert_close(got, model.to(wanted)(ids).detach(), rtol=1e-6, atol=1e-6)


def test_writing_into_a_narrow_tensor_is_refused():
    held = torch.zeros(3, dtype=torch.bfloat16)
    with lifted(torch.float32), pytest.raises(CannotLift, match="add_"):
        held[1:].add_(1.0)
    assert not held.any()
