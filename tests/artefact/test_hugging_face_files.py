"""Tests that saved Hugging Face models load without the hub, and that their files cannot load other code."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import xprune
from benchmarks.hugging_face_models import MODELS
from tests.support.hugging_face_models import build, counting, first, pruned, rows
from xprune.core.provenance import Arch
from xprune.modules.removed import Removed

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")


def test_a_language_model_from_dense_to_a_file_in_a_new_process(new_process, tmp_path):
    task, loader = xprune.LanguageModel(), counting()
    model = xprune.finetune(MODELS["hf llama"]()[0], loader, xprune.Finetune(epochs=12, lr=1e-2), task=task)
    dense = xprune.evaluate(model, loader, task=task)
    tuning = xprune.Finetune(epochs=6, lr=3e-3, distill=0.5)
    learned = xprune.LearnedThresholds(steps=8)
    pruner = xprune.Pruner(model, "taylor", xprune.Budget(params=0.85), learned, tuning, task)
    result = pruner.run(loader)
    assert result.metrics["pruned"].params <= 0.85 * result.metrics["dense"].params
    assert result.metrics["pruned"].macs < result.metrics["dense"].macs
    assert dense.metric > 0.5 and result.metrics["finetuned"].metric > 0.5  # chance is about 0.01
    result.save(tmp_path / "model")
    ids = next(iter(loader))["input_ids"]
    save_file({"ids": ids, "logits": first(result.model, {"input_ids": ids})}, tmp_path / "check.safetensors")
    new_process(
        "import sys; sys.modules['torch_pruning'] = None\n"
        "import torch; from safetensors.torch import load_file; from xprune.artefact import load\n"
        f"d = load_file({str(tmp_path / 'check.safetensors')!r}); model = load({str(tmp_path / 'model')!r})\n"
        "assert type(model).__module__.startswith('transformers.')\n"
        "with torch.no_grad(): assert torch.equal(model(d['ids']).logits, d['logits'])\n",
        check=True,
    )


def test_a_model_of_from_pretrained_through_the_whole_path(tmp_path):
    build("hf vit")[0].save_pretrained(tmp_path / "mine")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "mine")
    result = xprune.Pruner(model, "taylor", finetune=xprune.Finetune(epochs=1)).run(rows("hf vit"))
    assert result.metrics["pruned"].macs <= 0.5 * result.metrics["dense"].macs
    result.save(tmp_path / "model")
    assert "mine" not in (tmp_path / "model" / "xprune.json").read_text()  # where it came from is nobody's business
    loaded, inputs = xprune.load(tmp_path / "model"), MODELS["hf vit"]()[1]
    assert torch.equal(first(loaded, inputs), first(result.model, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_saved_equals_loaded(name, tmp_path, recwarn):
    model, inputs = pruned(name)
    model.set_attn_implementation("eager")
    first(model, inputs)  # Swin sets its windows in the forward pass
    xprune.save(model, tmp_path / "model")
    assert not [w for w in recwarn if "architecture" in str(w.message)]
    loaded = xprune.load(tmp_path / "model")
    assert type(loaded) is type(model) and torch.equal(first(loaded, inputs), first(model, inputs))
    assert any(isinstance(m, Removed) for m in loaded.modules()) == any(isinstance(m, Removed) for m in model.modules())


def test_what_a_config_does_not_tell_is_not_claimed(tmp_path):
    model = transformers.ViTModel(MODELS["hf vit"]()[0].config, add_pooling_layer=False)
    with pytest.warns(UserWarning, match=r"the ViTModel that transformers builds differs: .* pooler.*model_fn"):
        xprune.save(model, tmp_path / "model")
    with pytest.raises(xprune.ArtefactError, match="does not rebuild"):
        config = {**MODELS["hf vit"]()[0].config.to_dict(), "num_hidden_layers": 3}
        xprune.save(model, tmp_path / "model", arch=Arch("ViTModel", tuple(config.items()), "transformers"))


TAMPERING = {
    "an unknown library": ({"library": "pickle"}, "Known libraries"),
    "a library that is no name": ({"library": ["timm"]}, "Known libraries"),
    "no model": ({"name": "BertTokenizer"}, "not a model class"),
    "code of the standard library": ({"name": "os"}, "not a model class"),
    "a model that loads by name": ({"name": "TimmWrapperModel"}, "not a model class"),
    "a class of Auto": ({"name": "AutoModel"}, "not a model class"),
    "remote code": ({"auto_map": {"AutoModel": "them--evil.Model"}}, "code to run"),
    "remote code further down": ({"text_config": [{"auto_map": {"AutoModel": "evil"}}]}, "code to run"),
    "a backbone of the hub": ({"backbone": "facebook/dinov2-base"}, "weights to load"),
    "weights of the hub": ({"use_pretrained_backbone": True}, "weights to load"),
    "a kernel of the hub": ({"attn_implementation": "kernels-community/flash-attn"}, "eager and sdpa"),
    "the same by its private name": ({"_attn_implementation": "kernels-community/flash-attn"}, "not a setting"),
    "a config of the wrong type": ({"hidden_size": "wide"}, "cannot build"),
    "another width": ({"hidden_size": 27}, "does not fit|in the file"),
}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    return xprune.save(pruned("hf vit")[0], tmp_path_factory.mktemp("artefact") / "model")


@pytest.mark.parametrize("how", TAMPERING)
def test_a_config_that_is_not_ours_is_refused(how, artefact, tmp_path):
    change, message = TAMPERING[how]
    shutil.copytree(artefact, tmp_path / "model")
    path = tmp_path / "model" / "xprune.json"
    header = json.loads(path.read_text())
    for key, value in change.items():
        (header["arch"] if key in ("library", "name") else header["arch"]["kwargs"])[key] = value
    path.write_text(json.dumps(header))
    with pytest.raises(xprune.ArtefactError, match=message):
        xprune.load(tmp_path / "model")


def test_without_transformers_only_its_models_are_missing(new_process, tmp_path):
    xprune.save(pruned("hf vit")[0], tmp_path / "model")
    new_process(
        "import sys; sys.modules['transformers'] = None\n"
        "import timm, torch, xprune\n"
        "assert len(xprune.find_sites(timm.create_model('test_vit'), torch.randn(2, 3, 160, 160)))\n"
        f"try: xprune.load({str(tmp_path / 'model')!r})\n"
        "except xprune.ArtefactError as error: assert 'xprune[hf]' in str(error)\n"
        "else: raise AssertionError\n",
        check=True,
    )
