"""Tests the built-in unit kinds, and a new kind with its own way to gate and cut."""

import pytest
import torch
from torch import nn

import xprune
from tests.support.models import build, images, loader
from xprune.core.unit_kind import kinds_of, unit_kind
from xprune.testing import assert_untouched, check_adapter, check_exact, snapshot


class Nothing(nn.Module):
    """Replaces a removed branch. Returns zeros."""

    def forward(self, x, *args, **kwargs):
        return torch.zeros_like(x)


class Branch(xprune.UnitKind):
    """The kind of unit that is a whole attention or MLP. Nothing of it stays, not even a bias."""

    name = "branch"
    plural = "branches"
    singly = True

    def find(self, search):
        """Finds every attention and MLP of a timm ViT."""
        paths = [path for path, _ in search.model.named_modules() if path.split(".")[-1] in ("attn", "mlp")]
        width = search.model.embed_dim
        return xprune.Found({f"{path}:branch": self.site(search.model, path, width) for path in paths})

    def site(self, model, path, width):
        """Returns a site of one unit. Its features are those of the stream."""
        last = "proj" if path.endswith("attn") else "fc2"
        cuts = tuple(xprune.Cut(f"{path}.{last}.{part}", 0, 1, width) for part in ("weight", "bias"))
        return xprune.Site(f"{path}:branch", self.name, 1, width, (f"{path}.{last}",), cuts=cuts, module=path)

    def gate(self, site, hooks):
        """Gates the output of the branch, with its bias."""
        hooks.on_output(site.module, -1)

    def cut(self, model, site, keep, by_cuts):
        """Replaces the module if its unit is not kept."""
        if not keep:
            parent, _, child = site.module.rpartition(".")
            setattr(model.get_submodule(parent), child, Nothing())


@pytest.fixture
def branch(monkeypatch):
    """Registers the kind for one test."""
    monkeypatch.setitem(xprune.UNIT_KINDS, "branch", Branch())


def test_a_kind_that_gates_and_cuts_in_its_own_way_is_exact(branch):
    model = build("vit")
    sites = check_adapter(model, images(), units=["branch"], seeds=range(6))
    assert [site.name for site in sites] == [f"blocks.{i}.{part}:branch" for i in (0, 1) for part in ("attn", "mlp")]
    check_exact(model, xprune.Plan(sites, ((), (0,), (), (0,))), images())


def test_a_gate_of_its_own_wrongly_placed_is_refused(branch, monkeypatch):
    def gate(self, site, hooks):
        # A gate on the input does not remove the bias, so the gated model is wrong.
        hooks.on_input(site.consumers[0], -1)

    model, before = build("vit"), snapshot(build("vit"))
    sites = xprune.find_sites(model, images(), units=["branch"])
    monkeypatch.setattr(Branch, "gate", gate)
    with pytest.raises((xprune.SurgeryError, xprune.GateError), match="branch"):
        xprune.apply(model, xprune.Plan(sites, ((),) * 4), images())
    assert_untouched(model, before)


def test_a_run_with_a_kind_of_its_own(branch, tmp_path):
    pytest.importorskip("plotly")
    model = build("vit")
    sites = xprune.find_sites(model, images(), units=["branch"])
    budget = xprune.Budget(params=0.6, min_units=0)
    result = xprune.Pruner(model, "taylor", budget, finetune=None, sites=sites).run(loader(), loader())
    assert result.metrics["pruned"].params <= 0.6 * result.metrics["dense"].params
    assert 0 < sum(result.plan.counts) < 4 and "branches" in result.summary()
    page = result.report(tmp_path / "report.html").read_text()
    assert "Why was this branch removed?" in page
    for kind in ("units", "classes"):
        assert result.plot(kind).has_data()


@pytest.mark.parametrize(
    ("name", "one", "many"), [("head", "1 head", "1,000 heads"), ("channel", "1 channel", "1,000 channels")]
)
def test_units_in_words(name, one, many):
    kind = unit_kind(name)
    assert kind.many(1) == one and kind.many(1000) == many and len(kind.about) > 20


def test_kinds_that_are_looked_for_unasked_need_only_such():
    kinds = xprune.UNIT_KINDS
    assert [name for name, kind in kinds.items() if kind.by_default] == ["head", "neuron"]
    assert all(set(kind.needs) <= set(kinds) for kind in kinds.values())
    assert min(kinds.values(), key=lambda kind: kind.order).name == "channel"
    assert [kind.name for kind in kinds.values() if kind.crosses] == ["channel"]


def test_kinds_of_sites_come_once_in_their_order():
    sites = [xprune.Site(str(i), kind, 2, 1, ("a",)) for i, kind in enumerate(("neuron", "head", "neuron"))]
    assert [kind.name for kind in kinds_of(sites)] == ["neuron", "head"]
    with pytest.raises(xprune.PlanError, match="known: head, neuron, channel"):
        unit_kind("expert")
