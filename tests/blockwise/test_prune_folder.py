"""Tests of `prune_folder`: block by block gives what the whole model gives, and everything else is refused."""

import copy
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import xprune
from xprune.blockwise import prune
from xprune.blockwise.prune import prune_folder
from xprune.modules.calls import call
from xprune.surgery.gates import Gates

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 64}
MODELS = {
    "llama in bfloat16": (
        "LlamaForCausalLM",
        transformers.LlamaConfig(**TEXT, num_key_value_heads=2, dtype="bfloat16"),
        "model.layers",
    ),
    "qwen2 with tied embeddings": (
        "Qwen2ForCausalLM",
        transformers.Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True),
        "model.layers",
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**TEXT), "gpt_neox.layers"),
    "bert": ("BertForSequenceClassification", transformers.BertConfig(**TEXT), "bert.encoder.layer"),
    "vit": (
        "ViTForImageClassification",
        transformers.ViTConfig(**SMALL, image_size=16, patch_size=8),
        "vit.layers",
    ),
}
CRITERIA = ("magnitude", "magnitude,p=1", "random", "magnitude", "random")


def written(name, path):
    """Writes a model with random weights as transformers does, in several files."""
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    # transformers writes into the config.
    config = copy.deepcopy(config)
    model = getattr(transformers, kind)(config)
    if config.dtype is not None:
        model = model.to(config.dtype)
    with torch.no_grad():
        # Biases are 0 at first, which hides mistakes.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path, max_shard_size="20KB")
    return path


def inputs_of(name):
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(64, (2, 7), generator=generator)}


def all_tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(("name", "criterion"), zip(MODELS, CRITERIA, strict=True))
def test_block_by_block_gives_the_bits_of_the_whole_model(name, criterion, tmp_path):
    kind, _, path = MODELS[name]
    dense, budget, inputs = written(name, tmp_path / "dense"), xprune.Budget(macs=0.7), inputs_of(name)
    assert len(list(dense.glob("*.safetensors"))) > 1
    found = prune_folder(dense, tmp_path / "out", budget, criterion, example_inputs=inputs)
    model = getattr(transformers, kind).from_pretrained(dense).eval()
    sites = xprune.find_sites(model, inputs, inside=f"{path}.*")
    scores = xprune.score(model, sites, criterion=criterion)
    plan = xprune.select(model, scores, budget, example_inputs=inputs)
    whole = xprune.apply(model, plan, inputs)
    assert found.plan == plan and found.scores.sites == tuple(sites)
    assert all(torch.equal(a, b) for a, b in zip(found.scores.values, scores.values, strict=True))
    assert found.scores.info == scores.info and found.scores.scale == scores.scale
    xprune.save(whole, tmp_path / "whole")
    ours, theirs = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours)
    header, other = (json.loads((tmp_path / each / "xprune.json").read_text()) for each in ("out", "whole"))
    assert {key: header[key] for key in ("plan", "arch", "ties")} == {
        key: other[key] for key in ("plan", "arch", "ties")
    }
    with torch.no_grad():
        outputs = [call(each, inputs).logits for each in (xprune.load(tmp_path / "out"), whole)]
    assert torch.equal(*outputs)
    macs, dense_macs = found.pruned["macs"], found.dense["macs"]
    assert macs == xprune.count_macs(whole, inputs) <= 0.7 * dense_macs
    assert dense_macs == xprune.count_macs(model, inputs)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a small Llama."""
    return written("llama in bfloat16", tmp_path_factory.mktemp("llama") / "dense")


@dataclass(frozen=True)
class Activations(xprune.Criterion):
    """The mean square of what each unit hands to its consumer. It only runs the model."""

    name: ClassVar[str] = "activations"
    needs: ClassVar[str] = "forward"

    def score(self, context, sites):
        totals = [torch.zeros(site.size) for site in sites]

        def hook(place, site):
            def add(_module, args):
                features = args[0].float().square().mean((0, 1))
                totals[place] += features.view(site.size, -1).sum(1)

            return add

        handles = [
            context.model.get_submodule(site.consumers[0]).register_forward_pre_hook(hook(place, site))
            for place, site in enumerate(sites)
        ]
        with torch.no_grad():
            for inputs, _ in context.data(self.name):
                call(context.model, inputs)
        for handle in handles:
            handle.remove()
        return xprune.Scores(tuple(sites), tuple(totals), self.name)


def test_a_criterion_that_only_runs_the_model_gives_the_scores_of_the_whole_model(llama, tmp_path):
    inputs, labels = inputs_of("llama"), torch.zeros(2).long()
    batches = [(inputs, labels), ({"input_ids": inputs["input_ids"].flip(1)}, labels)]
    found = prune_folder(
        llama, tmp_path / "out", xprune.Budget(macs=0.7), Activations(), example_inputs=inputs, loader=batches
    )
    model = transformers.LlamaForCausalLM.from_pretrained(llama).eval()
    scores = xprune.score(model, found.plan.sites, batches, Activations())
    assert all(torch.equal(a, b) for a, b in zip(found.scores.values, scores.values, strict=True))
    assert found.scores.values[0].std() > 0


def test_whole_sites_may_go_and_excluded_blocks_stay(llama, tmp_path):
    found = prune_folder(
        llama,
        tmp_path / "out",
        xprune.Budget(macs=0.45, min_units=0),
        "random",
        tokens=6,
        exclude="model.layers.1.*",
        seed=3,
    )
    assert 0 in found.plan.counts and not any("layers.1." in site.name for site in found.plan.sites)
    assert found.errors[1] == 0.0
    dense, small = all_tensors(llama), all_tensors(tmp_path / "out")
    untouched = [name for name in dense if "layers.1." in name or "layers" not in name]
    assert untouched and all(torch.equal(dense[name], small[name]) for name in untouched)
    assert (
        xprune.count_macs(xprune.load(tmp_path / "out"), {"input_ids": torch.zeros(2, 6).long()})
        == found.pruned["macs"]
    )


class Own(nn.Module):
    """A model that is not part of transformers."""

    def __init__(self, like=lambda index: 12):
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, like(i)), nn.ReLU(), nn.Linear(like(i), 8)) for i in range(3)
        )

    def forward(self, x):
        x = self.inner(x)
        for part in self.parts:
            x = x + part(x)
        return x


def own_folder(path, model):
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    return path


def test_an_own_model_needs_a_function_that_builds_it(tmp_path):
    folder, x = own_folder(tmp_path / "dense", model := Own()), torch.randn(4, 4)
    with pytest.raises(xprune.ArtefactError, match=r"config\.json.*model_fn="):
        prune_folder(folder, tmp_path / "out", example_inputs=x)
    with pytest.warns(UserWarning, match="model_fn="):
        found = prune_folder(folder, tmp_path / "out", xprune.Budget(macs=0.6), example_inputs=x, model_fn=Own)
    loaded = xprune.load(tmp_path / "out", model_fn=Own)
    assert torch.allclose(loaded(x), xprune.apply(model, found.plan, x)(x), atol=1e-6)


REFUSED = {
    "gradients": ({"criterion": "taylor"}, xprune.PluginError, "needs gradients"),
    "masks that are learned": ({"criterion": "xpruner"}, xprune.PluginError, "needs gradients"),
    "channels of the stream": ({"units": ["head", "channel"]}, xprune.ModelError, "lie in all blocks at once"),
    "a selection that learns": ({"selection": "learned"}, xprune.PluginError, "learned: block by block"),
    "a wrong list": ({"blocks": "model.norm"}, xprune.ModelError, "no nn.ModuleList"),
    "no list of that name": ({"blocks": "model.blocks"}, xprune.ModelError, "no nn.ModuleList"),
    "a pattern that matches nothing": ({"exclude": "blocks.*"}, xprune.ModelError, "matches no site"),
    "an impossible budget": ({"budget": xprune.Budget(macs=0.01)}, xprune.BudgetError, "cannot be reached"),
    "a time": ({"budget": xprune.Budget(latency=0.9)}, xprune.BudgetError, "latency of a model"),
    "one sample": ({"example_inputs": {"input_ids": torch.zeros(1, 1).long()}}, xprune.ModelError, "two samples"),
    "inputs that do not fit": ({"example_inputs": torch.randn(2, 3, 4)}, xprune.ModelError, "forward fails"),
    "a mask whose values are read": (
        {"example_inputs": {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.ones(2, 3).long()}},
        xprune.ModelError,
        "perhaps those of attention_mask",
    ),
    "no tokens": ({"tokens": 0}, xprune.ModelError, "tokens= of at least 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(what, llama, tmp_path):
    options, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        prune_folder(llama, tmp_path / "out", **{"tokens": 6, **options})
    assert not (tmp_path / "out").exists()


def _different(path):
    return own_folder(path, Own(like)), {"model_fn": lambda: Own(like), "example_inputs": torch.randn(4, 4)}


def like(index):
    return 12 + index


class Tied(Own):
    """Two blocks with one weight."""

    def __init__(self):
        super().__init__()
        self.tie_weights()

    def tie_weights(self):
        self.parts[1][0].weight = self.parts[0][0].weight


def _tied(path):
    path.mkdir()
    held = Tied().state_dict()
    del held["parts.1.0.weight"]
    save_file(held, path / "model.safetensors")
    return path, {"model_fn": Tied, "example_inputs": torch.randn(4, 4)}


class Twice(Own):
    """Calls its blocks in another order."""

    def forward(self, x):
        x = self.inner(x)
        for part in [*self.parts, *self.parts][::-1]:
            x = x + part(x)
        return x


def _twice(path):
    return own_folder(path, Twice()), {"model_fn": Twice, "example_inputs": torch.randn(4, 4)}


def _two_lists(path):
    def build():
        return nn.ModuleDict({"a": Own(), "b": Own()})

    return own_folder(path, build()), {"model_fn": build, "example_inputs": torch.randn(4, 4)}


def _another_shape(path):
    return own_folder(path, Own()), {"model_fn": lambda: Own(lambda index: 16), "example_inputs": torch.randn(4, 4)}


def _lacks_a_tensor(path):
    path.mkdir()
    held = Own().state_dict()
    held["other.weight"] = held.pop("parts.2.0.weight")
    save_file(held, path / "model.safetensors")
    return path, {"model_fn": Own, "example_inputs": torch.randn(4, 4)}


def _config(change):
    def make(path):
        written("llama in bfloat16", path)
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))
        return path, {"tokens": 6}

    return make


def _index(change):
    def make(path):
        written("llama in bfloat16", path)
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index, path)
        file.write_text(json.dumps(index))
        return path, {"tokens": 6}

    return make


FOLDERS = {
    "blocks that differ": (_different, xprune.ModelError, "the blocks of parts differ"),
    "tied blocks": (_tied, xprune.ModelError, "is tied to"),
    "blocks that run twice": (_twice, xprune.ModelError, "does not call its blocks one after another"),
    "two lists of blocks": (_two_lists, xprune.ModelError, r"2 lists of blocks: a\.parts, b\.parts"),
    "other shapes": (_another_shape, xprune.ModelError, "describes another model"),
    "a tensor under another name": (_lacks_a_tensor, xprune.ModelError, r"parts\.2\.0\.weight.*other\.weight"),
    "an empty folder": (lambda path: (path.mkdir(), (path, {}))[1], xprune.ArtefactError, "holds neither"),
    "no folder": (lambda path: (path, {}), xprune.ArtefactError, "is no folder"),
    "a config without a class": (_config(lambda c: c.pop("architectures")), xprune.ArtefactError, "architectures"),
    "a config that names code": (_config(lambda c: c.update(auto_map={"a": "b"})), xprune.ArtefactError, "auto_map"),
    "an unknown class": (_config(lambda c: c.update(architectures=["Mine"])), xprune.ArtefactError, "Mine"),
    "an index that leads out": (
        _index(lambda index, _: index["weight_map"].update({"a": "../a.safetensors"})),
        xprune.ArtefactError,
        "not in the folder",
    ),
    "a shard that is missing": (
        _index(lambda index, path: (path / index["weight_map"]["lm_head.weight"]).unlink()),
        xprune.ArtefactError,
        "cannot be read",
    ),
    "an index that is wrong": (
        _index(lambda index, _: index["weight_map"].update({"more": index["weight_map"]["lm_head.weight"]})),
        xprune.ArtefactError,
        "does not hold the tensor more",
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_do_not_fit_are_refused_by_name(what, tmp_path):
    make, error, message = FOLDERS[what]
    folder, options = make(tmp_path / "dense")
    with pytest.raises(error, match=message):
        prune_folder(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_block_that_is_not_exact_leaves_the_old_artefact(llama, tmp_path, monkeypatch):
    prune_folder(llama, tmp_path / "out", xprune.Budget(macs=0.9), tokens=6)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    real = prune.remove_units

    def wrong(model, plan, *rest):
        """Cuts other units than the plan says, in the last block."""
        last = [
            site.name.startswith("model.layers.2.") and len(keep) < site.size
            for site, keep in zip(plan.sites, plan.keeps, strict=True)
        ]
        if len(plan.sites) == 2 and any(last):
            keeps = tuple(
                tuple(range(site.size - len(keep), site.size)) if bad else keep
                for site, keep, bad in zip(plan.sites, plan.keeps, last, strict=True)
            )
            plan = xprune.Plan(plan.sites, keeps)
        return real(model, plan, *rest)

    monkeypatch.setattr(prune, "remove_units", wrong)
    with pytest.raises(xprune.SurgeryError, match=r"the block model\.layers\.2 is not exact"):
        prune_folder(llama, tmp_path / "out", xprune.Budget(macs=0.7), "random", tokens=6)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_one_block_is_in_memory_at_a_time(llama, tmp_path, monkeypatch):
    """When a block is cut, all weights of the other blocks are on the meta device, and so are the embeddings."""
    seen, real = [], prune.verify

    def look(alone, *rest):
        opened = look.opened
        held = [name for name, parameter in opened.named_parameters() if not parameter.is_meta]
        seen.append((alone.path, held))
        return real(alone, *rest)

    def walk(model, *rest):
        look.opened = model
        return before(model, *rest)

    before = prune.walk
    monkeypatch.setattr(prune, "verify", look)
    monkeypatch.setattr(prune, "walk", walk)
    prune_folder(llama, tmp_path / "out", xprune.Budget(macs=0.7), tokens=6)
    assert [path for path, _ in seen] == [f"model.layers.{index}" for index in range(3)]
    # The blocks are no part of the model while it runs, so nothing of it is in memory.
    assert all(not held for _, held in seen)


def test_gates_work_on_a_model_whose_weights_are_in_files(llama, tmp_path):
    """An artefact that was opened with offload=True computes what the loaded one computes, also with gates."""
    found = prune_folder(llama, tmp_path / "out", xprune.Budget(macs=0.7), tokens=6)
    sites = [site for site in found.plan.sites if site.kind == "neuron"]
    outputs, inputs = [], inputs_of("llama")
    for offload in (False, True):
        model = xprune.load(tmp_path / "out", offload=offload)
        values = [torch.ones(model.get_submodule(site.consumers[0]).in_features) for site in sites]
        values[0][:3] = 0
        smaller = [xprune.Site(s.name, s.kind, len(v), 1, s.consumers) for s, v in zip(sites, values, strict=True)]
        with torch.no_grad(), Gates(smaller, values).attached(model):
            outputs.append(model(**inputs).logits)
    assert torch.equal(*outputs)


def test_the_files_of_a_kept_shard_size(llama, tmp_path):
    prune_folder(llama, tmp_path / "out", xprune.Budget(macs=0.9), tokens=6, max_shard_size=3000)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        held = load_file(shard)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 3000
