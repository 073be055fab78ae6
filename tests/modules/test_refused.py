"""Tests that models of kinds that xprune cannot work with are refused by name, by each public function that would fail.

The table holds one model for each kind. Kinds that can be handled are in it too.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import xprune
from tests.support.ordinary_models import labels, net, pairs, tokens
from xprune.errors import ModelError
from xprune.modules.refused import CUT, KINDS, RUN, SAVE, TRAIN, refuse


def changed(change):
    """Returns a function that builds the network and changes a part of it."""

    def build():
        model = net()
        change(model)
        return model

    return build


class Int8(nn.Module):
    """A linear layer with int8 weights, in the form of quantisation libraries."""

    def __init__(self, layer, parameter=False):
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (layer.weight.detach() / scale).round().to(torch.int8)
        if parameter:
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self.register_buffer("qweight", weight)
        self.register_buffer("scale", scale)
        self.bias, self.name = layer.bias, "weight" if parameter else "qweight"

    def forward(self, x):
        return F.linear(x, getattr(self, self.name).float() * self.scale, self.bias)


Foreign = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})


class Injected(nn.Module):
    """A linear layer with an adapter, in the form of PEFT."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class LoRALinear(nn.Module):
    """A linear layer with an adapter that only the name of the class shows."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.linear, self.down, self.up = layer, nn.Linear(layer.in_features, rank), nn.Linear(rank, layer.out_features)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class WithParameters(nn.Linear):
    """A linear layer whose adapter consists of two parameters."""

    def __init__(self, layer, rank=2):
        super().__init__(layer.in_features, layer.out_features)
        self.lora_A = nn.Parameter(torch.randn(rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.randn(layer.out_features, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Computes(torch.Tensor):
    """A tensor that computes its operations itself, in the form of torchao."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [arg.inner if isinstance(arg, Computes) else arg for arg in args]
        found = func(*args, **(kwargs or {}))
        return Computes(found) if func is torch.ops.aten.detach.default else found


def offloaded():
    from accelerate import cpu_offload

    return cpu_offload(net(), execution_device=torch.device("cpu"))


def dispatched():
    from accelerate import dispatch_model

    return dispatch_model(net(), {"block": "cpu", "head": "cpu"}, main_device="cpu", force_hooks=True)


def on_meta():
    with torch.device("meta"):
        return net()


def replace_fc1(kind):
    return changed(lambda model: setattr(model.block.mlp, "fc1", kind(model.block.mlp.fc1)))


def with_weight(convert):
    def change(model):
        layer = model.block.mlp.fc1
        layer.weight = nn.Parameter(convert(layer.weight.detach()), requires_grad=False)

    return changed(change)


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)


# Name -> (a function that builds the model, the kind of KINDS, a part of the message).
REFUSED = {
    "lazy layer": (changed(lambda m: setattr(m.block.mlp, "fc1", nn.LazyLinear(12))), "lazy", r"Run one forward pass"),
    "offloaded": (offloaded, "offloaded", "without device_map"),
    "dispatched": (dispatched, "dispatched", "AlignDevicesHook"),
    "meta": (on_meta, "meta", "on the meta device"),
    "partly meta": (changed(lambda m: m.block.mlp.to("meta")), "meta", r"block\.mlp\.fc1 in Net"),
    "script": (lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))), "script", "jit"),
    "partly script": (changed(lambda m: setattr(m, "head", torch.jit.script(m.head))), "script", r"head in Net.*jit"),
    "wrapped part": (changed(lambda m: setattr(m, "block", nn.DataParallel(m.block))), "wrapped part", "DataParallel"),
    "quantised layers": (quantised, "quantised layer", "before you quantise it"),
    "int8 buffer": (replace_fc1(Int8), "quantised weight", r"fc1 in Net.*qweight of torch\.int8"),
    "int8 parameter": (replace_fc1(lambda layer: Int8(layer, True)), "quantised weight", r"weight of torch\.int8"),
    "a quantisation library": (
        changed(lambda m: setattr(m.block.mlp, "fc1", Foreign(8, 12))),
        "quantised weight",
        "Linear4bit of the library bitsandbytes",
    ),
    "float8": (with_weight(lambda weight: weight.to(torch.float8_e4m3fn)), "quantised weight", "float8_e4m3fn"),
    "adapter of PEFT": (replace_fc1(Injected), "adapter", r"fc1 in Net.*lora_A.*Merge first"),
    "adapter by class": (replace_fc1(LoRALinear), "adapter", "LoRALinear.*Merge first"),
    "adapter of parameters": (replace_fc1(WithParameters), "adapter", "lora_A.*Merge first"),
    "tensor class": (with_weight(Computes), "tensor class", "Computes"),
    "sparse": (with_weight(lambda weight: weight.to_sparse()), "layout", "to_dense"),
    "sparse rows": (with_weight(lambda weight: weight.to_sparse_csr()), "layout", "to_dense"),
}


def plan_of(model):
    """A plan of the network as it is without changes."""
    return xprune.Plan.full(xprune.find_sites(net(), tokens()))


ENTRIES = {
    CUT: {
        "find_sites": lambda model, folder: xprune.find_sites(model, tokens()),
        "apply": lambda model, folder: xprune.apply(model, plan_of(model), tokens()),
        "score": lambda model, folder: xprune.score(model, plan_of(model).sites, pairs(), "taylor"),
        "Pruner": lambda model, folder: xprune.Pruner(model, "taylor", finetune=None, latency=False).run(pairs()),
    },
    TRAIN: {"finetune": lambda model, folder: xprune.finetune(model, pairs(), xprune.Finetune(epochs=1))},
    SAVE: {"save": lambda model, folder: xprune.save(model, folder / "saved")},
    RUN: {
        "evaluate": lambda model, folder: xprune.evaluate(model, pairs()),
        "latency": lambda model, folder: xprune.latency(model, tokens()),
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name, tmp_path):
    build, wanted, message = REFUSED[name]
    model = build()
    kind = next(kind for kind in KINDS if kind.name == wanted)
    assert CUT in kind.works
    for work in kind.works:
        for entry, function in ENTRIES[work].items():
            with pytest.raises(ModelError, match=message) as caught:
                function(model, tmp_path)
            assert "cannot be used, because" in str(caught.value), entry
    assert not list(tmp_path.iterdir())
    # A work for which the kind is not refused may not be refused for another kind either.
    for work in {CUT, TRAIN, SAVE, RUN} - kind.works:
        refuse(model, work)


def test_every_kind_has_a_case():
    # A tensor of this kind needs a group of processes.
    assert {kind.name for kind in KINDS} == {wanted for _, wanted, _ in REFUSED.values()} | {"distributed tensors"}


def test_tensors_that_are_spread_over_processes(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = with_weight(lambda weight: distribute_tensor(weight, mesh, [Replicate()]))()
        with pytest.raises(ModelError, match="DTensor, which is spread over processes"):
            xprune.find_sites(model, tokens())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Embedding])
def test_ordinary_layers_are_not_refused(kind):
    layer = kind(4, 4) if kind is not nn.LayerNorm else kind(4)
    # Names that only contain the letters of an adapter, and integers that are no weights.
    layer.flora = layer.exploration = layer.base_layer = nn.Identity()
    layer.register_buffer("index", torch.arange(4))
    layer.register_buffer("weight_mask", torch.ones(4, dtype=torch.bool))
    for work in (CUT, TRAIN, SAVE, RUN):
        refuse(layer, work)


def masked(layer):
    torch.nn.utils.prune.random_unstructured(layer, "weight", 0.3)


def norm_of_old(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


# Name -> (what is done to a layer, the call that the message advises).
REPARAMETRISED = {
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "old weight_norm": (norm_of_old, "remove_weight_norm"),
    "old spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "masks": (masked, "prune.remove"),
}


@pytest.mark.parametrize("place", ["mlp.fc1", "mlp.fc2", "attn.out_proj"])
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_a_layer_whose_weight_is_computed(name, place, tmp_path):
    change, advice = REPARAMETRISED[name]
    model = net()
    change(model.block.get_submodule(place))
    sites = xprune.find_sites(model, tokens())
    of_layer = [why for path, why in sites.left.items() if "block" in path]
    # Either the layer is cut exactly, together with the tensors that its weight is computed from, or the reason says
    # what to do.
    assert of_layer or len(sites) == 2
    for why in of_layer:
        assert f"block.{place} is a layer whose weight cannot be cut" in why and advice in why
    plan = xprune.Plan(sites, tuple((0,) for _ in sites))
    pruned = xprune.apply(model, plan, tokens())
    tuned = xprune.finetune(pruned, pairs(), xprune.Finetune(epochs=1))

    def build():
        dense = net()
        change(dense.block.get_submodule(place))
        return dense

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xprune.save(tuned, tmp_path / "saved")
    loaded = xprune.load(tmp_path / "saved", model_fn=build)
    torch.testing.assert_close(loaded(tokens()), tuned(tokens()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, norm_of_old])
def test_a_half_cut_weight_norm_is_refused_before_it_runs(change):
    """torch does not compare the shapes, and would write outside of the smaller tensor."""
    model = net()
    change(model.block.mlp.fc1)
    owner, length = ("", "weight_g") if change is norm_of_old else ("parametrizations.weight.", "original0")
    cut = xprune.Cut(f"block.mlp.fc1.{owner}{length}", 0)
    site = xprune.Site("block.mlp", "neuron", 12, 1, ("block.mlp.fc2",), cuts=(cut,))
    with pytest.raises(xprune.PlanError, match="the tensors of weight_norm do not fit together"):
        xprune.apply(model, xprune.Plan((site,), ((0, 1, 2),)), tokens())


def test_a_model_built_in_inference_mode_is_handled():
    with torch.inference_mode():
        model = net()
    result = xprune.Pruner(model, "taylor", xprune.Budget(params=0.9), latency=False).run(pairs())
    assert xprune.count_params(result.model) <= 0.9 * xprune.count_params(model)


def test_frozen_models_are_refused_before_any_work(monkeypatch):
    model = net().requires_grad_(False)
    with pytest.raises(ModelError, match="all weights of Net are frozen"):
        xprune.finetune(model, pairs())
    monkeypatch.setattr(xprune.pipeline, "find_sites", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(ModelError, match=r"all weights of Net are frozen.*finetune=None"):
        xprune.Pruner(model, "taylor", latency=False).run(pairs())
    monkeypatch.undo()
    result = xprune.Pruner(model, "taylor", xprune.Budget(params=0.9), finetune=None, latency=False).run(pairs())
    assert not any(weight.requires_grad for weight in result.model.parameters())


def test_flags_of_frozen_weights_are_kept(tmp_path):
    model = net()
    model.block.requires_grad_(False)
    model.block.norm.requires_grad_(True)
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    result = xprune.Pruner(model, "taylor", xprune.Budget(params=0.9), latency=False).run(pairs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result.save(tmp_path / "saved")
    loaded = xprune.load(tmp_path / "saved", model_fn=net)
    for pruned in (result.model, loaded):
        assert {name: weight.requires_grad for name, weight in pruned.named_parameters()} == flags
    # Frozen weights are those of the dense model, apart from the cut.
    assert torch.equal(copy.deepcopy(loaded).block.mlp.fc2.bias, model.block.mlp.fc2.bias)


def test_a_wrapped_model_is_loaded_into_its_inner_model(tmp_path):
    model = nn.DataParallel(net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xprune.save(model, tmp_path / "saved")
    loaded = xprune.load(tmp_path / "saved", model_fn=lambda: nn.DataParallel(net()))
    assert type(loaded) is type(net()) and loaded(tokens()).shape == (len(labels()), 3)
