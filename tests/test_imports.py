"""What importing the package brings: nothing that takes long, and no output."""

import subprocess
import sys

import pytest

from xprune.adapters import OURS

HEAVY = (
    "captum",
    "matplotlib",
    "onnx",
    "pandas",
    "plotly",
    "scipy",
    "sklearn",
    "timm",
    "torch._dynamo",
    "torch.utils.benchmark",
    "torch.utils.cpp_extension",
    "torch_geometric",
    "torch_pruning",
    "torchmetrics",
    "torchvision",
    "transformers",
)
"""Modules that take long to import, or print while they are imported. The function that needs one imports it."""

IMPORT = "import xprune"
TABLES = """
import torch, xprune
[*xprune.CRITERIA], len(xprune.ADAPTERS), [*xprune.SELECTIONS]
xprune.classes_of_xprune(torch.nn.Linear(2, 3))
"""
HELP = "import sys; from xprune.cli import app; app(['--help'], standalone_mode=False)"
WITHOUT_EXTRAS = """
import sys
sys.modules |= dict.fromkeys(("torch_geometric", "transformers", "onnx", "plotly", "jinja2", "matplotlib"))
import torch, xprune
model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
assert [site.kind for site in xprune.find_sites(model, torch.zeros(1, 3, 8))] == ["head", "neuron"]
assert xprune.classes_of_xprune(model) == {}
"""


def loaded_by(code):
    """(the heavy modules that a fresh process has after this code, what it has printed)."""
    ask = f"\nimport sys; print('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + ask], capture_output=True, text=True, check=True)
    printed, _, names = done.stdout.rpartition("loaded:")
    return set(names.split()), printed + done.stderr


@pytest.mark.smoke
@pytest.mark.parametrize("code", [IMPORT, TABLES], ids=["import", "tables"])
def test_nothing_heavy_is_imported_and_nothing_is_printed(code):
    loaded, printed = loaded_by(code)
    assert not loaded and not printed


def test_the_help_of_the_command_line_imports_nothing_heavy():
    loaded, printed = loaded_by(HELP)
    assert not loaded
    assert "Usage:" in printed and "CUDA" not in printed


@pytest.mark.smoke
def test_sites_are_found_without_the_extras():
    subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], check=True)


@pytest.mark.smoke
def test_a_criterion_is_a_class_once_it_is_looked_up():
    code = """
import xprune, sys
assert "captum:IntegratedGradients" in xprune.CRITERIA and "captum" not in sys.modules
kind = xprune.CRITERIA["captum:IntegratedGradients"]
assert issubclass(kind, xprune.Criterion) and "captum" in sys.modules
assert dict(xprune.CRITERIA)["captum:IntegratedGradients"] is kind
assert all(kind.name == name for name, kind in xprune.CRITERIA.items())
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("adapter", OURS, ids=lambda adapter: adapter.name)
def test_every_class_that_an_adapter_names_is_there(adapter):
    if adapter.name.startswith("pyg"):
        pytest.importorskip("torch_geometric")
    for kind in (adapter.pruned, adapter.gated, adapter.removed):
        assert kind is None or isinstance(kind, type)
