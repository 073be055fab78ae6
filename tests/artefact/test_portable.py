"""Tests that a pickled pruned model loads without xprune, or says that it holds a class of xprune."""

import copy

import pytest
import torch

import xprune
from tests.support.models import build, images
from xprune.core.provenance import Arch, Provenance, provenance
from xprune.modules.calls import call, logits
from xprune.testing import perturb, random_plan

VISION = ("vit", "deit-distilled", "deit3", "swin", "swiglu", "qk-norm")
TEXT = ("hf bert", "hf llama")
READER = """
import sys, torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("xprune", "torch_pruning"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
read = torch.load(sys.argv[1], weights_only=False)
model, inputs, expected = read["model"], read["inputs"], read["outputs"]
with torch.no_grad():
    outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
outputs = outputs["logits"] if hasattr(outputs, "keys") else outputs
assert torch.equal(outputs, expected)
print("read")
"""


def dense(name):
    """(model, inputs)."""
    if name in TEXT:
        pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")
        from benchmarks.hugging_face_models import MODELS

        model, inputs = MODELS[name]()
        return perturb(model), inputs
    return build(name), images()


def pruned(name, gone=0.0):
    model, inputs = dense(name)
    return xprune.apply(model, random_plan(xprune.find_sites(model, inputs), 3, gone), inputs), inputs


@torch.no_grad()
def elsewhere(model, inputs, folder, new_process):
    """What a process without xprune says when it reads the pickled model and compares its outputs."""
    outputs = logits(call(model, inputs))
    torch.save(
        {"model": model, "inputs": dict(inputs) if hasattr(inputs, "keys") else inputs, "outputs": outputs},
        folder / "whole.pt",
    )
    return new_process(READER, folder / "whole.pt")


@pytest.mark.parametrize("name", [*VISION, *TEXT])
def test_a_pickled_model_is_read_without_xprune(name, new_process, tmp_path):
    model, inputs = pruned(name)
    assert provenance(model) and xprune.classes_of_xprune(model) == {}
    done = elsewhere(model, inputs, tmp_path, new_process)
    assert done.stdout == "read\n", done.stderr


@pytest.mark.parametrize(
    ("name", "gone", "holds"), [("vit", 0.9, "Removed"), ("swinv2", 0.0, "PrunedWindowAttentionV2")]
)
def test_a_model_that_holds_our_classes_says_so(name, gone, holds, new_process, tmp_path):
    model, inputs = pruned(name, gone)
    found = xprune.classes_of_xprune(model)
    assert found and all(kind.startswith("xprune.") for kind in found.values())
    assert any(kind.endswith(holds) for kind in found.values())
    for path, kind in found.items():
        part = model.get_submodule(path)
        assert kind == f"{type(part).__module__}.{type(part).__qualname__}"
    assert "is not installed here" in elsewhere(model, inputs, tmp_path, new_process).stderr


def plain(value):
    """True for dicts, lists, strings and numbers all the way down."""
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str)


def test_what_the_model_carries_is_plain_data_and_is_read_back():
    model, _ = pruned("vit")
    assert plain(model._xprune_provenance)
    assert provenance(model) == provenance(copy.deepcopy(model))
    assert provenance(build("vit")) is None


def test_pruning_twice_composes_also_from_what_an_older_version_carried(tmp_path):
    """xprune 0.1 put an object of its own on the model."""
    model, inputs = pruned("vit")
    older = copy.deepcopy(model)
    carried = Provenance(provenance(model).plan, Arch("vit_tiny_patch16_224", (("depth", 2),)))
    object.__setattr__(older, "_xprune_provenance", carried)
    plan = random_plan(xprune.find_sites(model, inputs), 8, 0.0)
    twice, twice_older = (xprune.apply(each, plan, inputs) for each in (model, older))
    assert provenance(twice).plan == provenance(twice_older).plan
    assert provenance(twice).plan.counts == plan.counts
    assert provenance(twice).plan.sites == provenance(model).plan.sites  # of the original architecture
    assert provenance(twice_older).arch == carried.arch and provenance(twice).arch is None


def test_a_model_of_an_artefact_carries_its_architecture(tmp_path):
    from tests.support.models import CLASSES, VIT

    model, _ = pruned("vit")
    arguments = {**VIT, "num_classes": CLASSES}
    loaded = xprune.load(xprune.save(model, tmp_path / "model", arch=("vit_tiny_patch16_224", arguments)))
    assert plain(loaded._xprune_provenance)
    assert dict(provenance(loaded).arch.kwargs) == arguments


def test_the_summary_says_what_a_pickle_needs(tmp_path):
    scores = xprune.Scores((), (), "none")
    metrics = {"dense": xprune.Metrics(0.5, 1.0, 10)}
    for name, gone, said in (("vit", 0.0, False), ("vit", 0.9, True)):
        model, _ = pruned(name, gone)
        result = xprune.PruneResult(model, provenance(model).plan, scores, metrics)
        assert ("Removed" in result.summary()) is said
