"""Tests that a loaded model equals the saved one bit for bit, and that wrong or foreign files are refused."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import xprune
from tests.support.models import CLASSES, MODELS, SIZE, VIT, build, images
from xprune.artefact import rebuild
from xprune.testing import random_plan

ARCH = ("vit_tiny_patch16_224", {**VIT, "num_classes": CLASSES})


def pruned(name="vit", seed=0, gone=0.3):
    model = build(name)
    return xprune.apply(model, random_plan(xprune.find_sites(model, images()), seed, gone), images())


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    return xprune.save(pruned(), tmp_path_factory.mktemp("artefact") / "model", arch=ARCH)


@pytest.fixture
def saved(artefact, tmp_path):
    """An artefact that a test may change."""
    return shutil.copytree(artefact, tmp_path / "model")


@pytest.mark.parametrize("name", MODELS)
def test_saved_equals_loaded(name, tmp_path):
    model = pruned(name)
    with pytest.warns(UserWarning, match="architecture is not saved"):
        xprune.save(model, tmp_path / "model")
    loaded = xprune.load(tmp_path / "model", model_fn=MODELS[name])
    assert torch.equal(loaded(images()), model(images()))
    assert not loaded.training and type(loaded) is type(model)


def test_a_new_process_needs_neither_the_model_nor_torch_pruning(saved, new_process, tmp_path):
    expected = {"x": images(), "y": xprune.load(saved)(images()).detach()}
    save_file(expected, tmp_path / "check.safetensors")
    code = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        "import torch; from safetensors.torch import load_file; from xprune.artefact import load\n"
        f"d = load_file({str(tmp_path / 'check.safetensors')!r})\n"
        f"assert torch.equal(load({str(saved)!r})(d['x']), d['y'])\n"
    )
    new_process(code, check=True)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "deit_tiny_patch16_224"])
def test_a_model_built_by_its_name_carries_it(name, tmp_path, recwarn):
    model = timm.create_model(name, num_classes=CLASSES)
    size = model.pretrained_cfg["input_size"][1]
    x = torch.randn(2, 3, size, size)
    small = xprune.apply(model, random_plan(xprune.find_sites(model, x), 0), x)
    xprune.save(small, tmp_path / "model")
    assert not [w for w in recwarn if "architecture" in str(w.message)]
    assert torch.equal(xprune.load(tmp_path / "model")(x), small(x))


@pytest.mark.parametrize("kwargs", [{"img_size": SIZE}, {"depth": 2}, {"drop_path_rate": 0.2}, {"qk_norm": True}])
def test_a_model_that_its_name_does_not_rebuild_says_so(kwargs, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **kwargs)
    with pytest.warns(UserWarning, match=r"differs.*model_fn"):
        xprune.save(model, tmp_path / "model")
    with pytest.raises(xprune.ArtefactError, match="model_fn"):
        xprune.load(tmp_path / "model")
    xprune.save(model, tmp_path / "model", arch=("vit_tiny_patch16_224", kwargs))
    assert xprune.load(tmp_path / "model").num_classes == 1000


def test_an_architecture_whose_rebuilding_fails_without_a_message_is_not_proved(monkeypatch):
    def fail(*_):
        raise ValueError

    monkeypatch.setattr(rebuild, "build", fail)
    arch, why = rebuild.proved_arch(timm.create_model("test_vit"), xprune.Plan((), ()), None)
    assert arch is None and "ValueError" in why


def test_a_wrong_architecture_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(xprune.ArtefactError, match="does not rebuild"):
        xprune.save(pruned(), tmp_path / "model", arch="vit_small_patch16_224")
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_is_pruned_again_and_plans_compose(saved, tmp_path):
    first = xprune.load(saved)
    sites = xprune.find_sites(first, images())
    scores = xprune.score(first, sites, criterion="random")
    budget = xprune.Budget(params=0.8)
    plan = xprune.select(first, scores, budget, example_inputs=images())
    second = xprune.apply(first, plan, images())
    assert xprune.count_params(second) <= 0.8 * xprune.count_params(first)
    xprune.save(second, tmp_path / "again")
    assert torch.equal(xprune.load(tmp_path / "again")(images()), second(images()))
    header = json.loads((tmp_path / "again" / "xprune.json").read_text())
    assert {site["name"]: site["size"] for site in header["plan"]["sites"]}["blocks.0.mlp"] == 96


def test_tied_weights_survive(tmp_path):
    def build_tied():
        model = build("vit")
        model.blocks[1].mlp = model.blocks[0].mlp
        return model

    model = build_tied()
    small = xprune.apply(model, random_plan(xprune.find_sites(model, images()), 1, gone=0), images())
    with pytest.warns(UserWarning, match="not saved"):
        xprune.save(small, tmp_path / "model")
    loaded = xprune.load(tmp_path / "model", model_fn=build_tied)
    assert loaded.blocks[1].mlp.fc1.weight is loaded.blocks[0].mlp.fc1.weight
    assert torch.equal(loaded(images()), small(images()))


def test_half_precision_survives(tmp_path):
    model = pruned().to(torch.bfloat16)
    xprune.save(model, tmp_path / "model", arch=ARCH)
    x = images().to(torch.bfloat16)
    assert torch.equal(xprune.load(tmp_path / "model")(x), model(x))


def test_an_old_artefact_is_replaced_and_a_foreign_directory_is_not(saved, tmp_path):
    xprune.save(pruned(seed=5), saved, arch=ARCH)
    assert torch.equal(xprune.load(saved)(images()), pruned(seed=5)(images()))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(xprune.ArtefactError, match=r"did not write: thesis\.txt"):
        xprune.save(pruned(), tmp_path / "mine", arch=ARCH)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def edit(change):
    """A way to tamper with the JSON."""

    def tamper(folder):
        path = folder / "xprune.json"
        header = json.loads(path.read_text())
        change(header)
        path.write_text(json.dumps(header))

    return tamper


def _keep(value):
    return edit(lambda h: h["plan"]["keeps"].__setitem__(1, value))


def _weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"][0] += 1
    save_file(tensors, folder / "model.safetensors")


def _shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"] = tensors["head.bias"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")


TAMPERING = {
    "missing weights": (lambda f: (f / "model.safetensors").unlink(), "needs the files model.safetensors"),
    "missing header": (lambda f: (f / "xprune.json").unlink(), "needs the files model.safetensors"),
    "truncated header": (lambda f: (f / "xprune.json").write_text('{"format": 1,'), "truncated"),
    "foreign header": (lambda f: (f / "xprune.json").write_text('{"model_type": "bert"}'), "not written by xprune"),
    "header that is a list": (lambda f: (f / "xprune.json").write_text("[1]"), "not written by xprune"),
    "other format": (edit(lambda h: h.update(format=99)), "format 99"),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "cannot be read|checksum",
    ),
    "weights that are no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04junk"),
        "cannot be read",
    ),
    "changed weights": (_weights, "checksum"),
    "changed shape": (_shape, r"head\.bias"),
    "unknown architecture": (edit(lambda h: h["arch"].update(name="evil_net")), "not an architecture of timm"),
    "hub name": (edit(lambda h: h["arch"].update(name="hf-hub:someone/model")), "not an architecture of timm"),
    "a file to load": (edit(lambda h: h["arch"]["kwargs"].update(checkpoint_path="/etc/passwd")), "not allowed"),
    "a download": (edit(lambda h: h["arch"]["kwargs"].update(pretrained=True)), "not allowed"),
    "an unknown argument": (edit(lambda h: h["arch"]["kwargs"].update(colour="red")), "cannot build"),
    "index out of range": (_keep([0, 96]), "0 to 95"),
    "index twice": (_keep([3, 3]), "sorted and distinct"),
    "index negative": (_keep([-1, 3]), "0 to 95"),
    "index no integer": (_keep([0.5]), "integers"),
    "units of another plan": (_keep([0, 1, 2]), "in the file"),
    "a tensor that is not there": (
        edit(lambda h: h["plan"]["sites"][1]["cuts"][0].update(tensor="blocks.0.mlp.fc9.weight")),
        "does not fit",
    ),
    "an unknown adapter": (edit(lambda h: h["plan"]["sites"][0].update(adapter="mine")), "no adapter"),
    "a site without cuts": (edit(lambda h: h["plan"]["sites"][0].pop("cuts")), "not a site"),
    "a plan that is none": (edit(lambda h: h.update(plan=3)), "not a plan"),
    "ties to nowhere": (edit(lambda h: h.update(ties={"head.bias": "gone"})), "in the file"),
}


@pytest.mark.parametrize("how", TAMPERING)
def test_a_file_that_is_not_ours_is_refused(how, saved):
    tamper, message = TAMPERING[how]
    tamper(saved)
    with pytest.raises(xprune.ArtefactError, match=message):
        xprune.load(saved)


def test_nothing_saved_is_pickled(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors", "xprune.json"]
    with pytest.raises(xprune.ArtefactError, match="no saved model"):
        xprune.load(saved / "nowhere")
    assert isinstance(xprune.load(saved), nn.Module)


@pytest.mark.parametrize("offload", [False, True])
def test_weights_in_several_files_are_the_same_model(offload, tmp_path):
    model = pruned()
    xprune.save(model, tmp_path / "one", arch=ARCH)
    xprune.save(model, tmp_path / "several", arch=ARCH, max_shard_size=10_000)
    shards = sorted((tmp_path / "several").glob("model-*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "several" / "model.safetensors").exists()
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert max(shard.stat().st_size for shard in shards) < max(10_000, largest) + 10_000
    loaded = xprune.load(tmp_path / "several", offload=offload)
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))
        assert torch.equal(xprune.load(tmp_path / "one", offload=offload)(images()), model(images()))
    assert all(parameter.is_meta is offload for parameter in loaded.parameters())


def test_an_offloaded_model_is_neither_cut_nor_saved(tmp_path):
    xprune.save(pruned(), tmp_path / "model", arch=ARCH)
    loaded = xprune.load(tmp_path / "model", offload=True)
    with pytest.raises(xprune.ModelError, match="Accelerate has offloaded"):
        xprune.find_sites(loaded, images())
    with pytest.raises(xprune.ModelError, match="Accelerate has offloaded"):
        xprune.save(loaded, tmp_path / "again")


def _lost(folder, header):
    next(folder.glob("model-0*.safetensors")).unlink()


def _truncated(folder, header):
    shard = next(folder.glob("model-0*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])


def _other_values(folder, header):
    shard = next(folder.glob("model-0*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)


def _leads_out(folder, header):
    header["shards"] = {f"../{name}": digest for name, digest in header["shards"].items()}


def _names_few(folder, header):
    header["shards"] = dict(list(header["shards"].items())[:1])


def _not_a_dict(folder, header):
    header["shards"] = ["model-00001-0123456789abcdef.safetensors"]


def _of_format_1(folder, header):
    header["format"] = 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_lost, "needs the files model-0"),
        (_truncated, "cannot be read"),
        (_other_values, "checksum differs"),
        (_leads_out, "damaged or was changed by hand"),
        (_names_few, "absent in the file"),
        (_not_a_dict, "damaged or was changed by hand"),
        (_of_format_1, "of format 1"),
    ],
)
def test_spoiled_shards_are_refused(spoil, message, tmp_path):
    folder = xprune.save(pruned(), tmp_path / "model", arch=ARCH, max_shard_size=50_000)
    header = json.loads((folder / "xprune.json").read_text())
    spoil(folder, header)
    (folder / "xprune.json").write_text(json.dumps(header))
    with pytest.raises(xprune.ArtefactError, match=message):
        xprune.load(folder)
