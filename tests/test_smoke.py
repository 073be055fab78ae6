"""Runs every stage once for each criterion, each kind of model and each extra.

`make test-minimum` runs these tests on the lowest versions of the dependencies that pyproject.toml allows.
"""

import copy

import pytest
import torch

import xprune
from tests.support.models import build, images, loader
from xprune.artefact.onnx import export_onnx
from xprune.testing import perturb, random_plan

SETTINGS = {"xpruner": "xpruner,steps=4"}
"""Fewer steps than by default: the path is the same."""
BUDGET = xprune.Budget(macs=0.6)


def _timm(name):
    return build(name), loader(), images()


def _hugging_face(name):
    from tests.support import hugging_face_models

    model, inputs = hugging_face_models.build(name)
    return model, hugging_face_models.rows(name), inputs


CASES = {
    "timm vit": lambda: _timm("vit"),
    "timm swin": lambda: _timm("swin"),
    "hf bert": lambda: _hugging_face("hf bert"),
}
"""Name -> (model, batches, example inputs)."""


@pytest.fixture(scope="module", params=CASES)
def case(request):
    if request.param.startswith("hf"):
        pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")
    model, batches, example = CASES[request.param]()
    return model, batches, example, xprune.find_sites(model, example)


def outputs(model, example):
    """Returns the first output of the model."""
    with torch.no_grad():
        found = model(**example) if isinstance(example, dict) else model(example)
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:the architecture is not saved")
@pytest.mark.parametrize("criterion", xprune.CRITERIA)
def test_from_sites_to_a_saved_model(case, criterion, tmp_path):
    model, batches, example, sites = case
    assert {site.kind for site in sites} == {"head", "neuron"}
    scores = xprune.score(model, sites, batches, SETTINGS.get(criterion, criterion), budget=BUDGET)
    plan = xprune.select(model, scores, BUDGET, "global", example_inputs=example)
    # `apply` raises an error if pruned and gated outputs are not equal.
    pruned = xprune.apply(model, plan, example)
    assert xprune.count_macs(pruned, example) <= BUDGET.macs * xprune.count_macs(model, example)
    xprune.save(pruned, tmp_path / "model")
    loaded = xprune.load(tmp_path / "model", model_fn=lambda: copy.deepcopy(model))
    assert torch.equal(outputs(loaded, example), outputs(pruned, example))


@pytest.mark.smoke
@pytest.mark.parametrize("selection", xprune.SELECTIONS)
def test_selections_and_a_whole_run(selection, tmp_path):
    chosen = xprune.LearnedThresholds(steps=2) if selection == "learned" else selection
    pruner = xprune.Pruner(build("vit"), "magnitude", BUDGET, chosen, xprune.Finetune(epochs=2))
    result = pruner.run(loader(), loader())
    assert 0 <= result.metrics["finetuned"].metric <= 1
    assert result.summary()


@pytest.mark.smoke
def test_extra_report(result, tmp_path):
    for needed in ("jinja2", "matplotlib", "plotly"):
        pytest.importorskip(needed, reason=f"needs {needed}: pip install 'xprune[report]'")
    assert "<html" in result.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert result.plot("units") is not None


@pytest.mark.smoke
def test_extra_onnx(tmp_path):
    for needed in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(needed, reason=f"needs {needed}: pip install 'xprune[onnx]'")
    model = build("vit")
    pruned = xprune.apply(model, random_plan(xprune.find_sites(model, images()), 4, gone=0), images())
    assert export_onnx(pruned, images(), tmp_path / "model.onnx") < 1e-4


@pytest.mark.smoke
def test_extra_graph():
    pytest.importorskip("torch_geometric", reason="needs torch_geometric: pip install 'xprune[graph]'")
    from tests.support.graph_models import Net, graph

    data = graph()
    model, example = perturb(Net()), (data.x, data.edge_index)
    sites = xprune.find_sites(model, example)
    pruned = xprune.apply(model, random_plan(sites, 1), example)
    assert xprune.count_params(pruned) < xprune.count_params(model)


@pytest.mark.smoke
def test_extra_detection():
    pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'xprune[detection]'")
    from tests.support.tasks import Boxes, box_of, collated

    metrics = xprune.evaluate(Boxes(), [collated([box_of(0), box_of(1)])], task=xprune.Detection(classes=2))
    assert metrics.metric_name == "mAP" and 0 < metrics.metric <= 1


@pytest.mark.smoke
def test_attention_of_torch():
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.TransformerEncoderLayer(6, 2, 12, batch_first=True))
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    sites = xprune.find_sites(perturb(model), x)
    pruned = xprune.apply(model, random_plan(sites, 0), x)
    assert xprune.count_params(pruned) < xprune.count_params(model)
