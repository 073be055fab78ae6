"""Tests plug-ins of another package, which are found through its entry points."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adapters.md").read_text()

CRITERION = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from xprune import Criterion, Scores


@dataclass(frozen=True)
class LastFirst(Criterion):
    """The later a unit, the higher its score."""

    scale: float = 1.0
    name: ClassVar[str] = "last-first"

    def score(self, context, sites):
        values = tuple(self.scale * torch.arange(1.0, site.size + 1) for site in sites)
        table = tuple(torch.stack([value, value.flip(0)]) for value in values)
        return Scores(tuple(sites), values, self.name, table)
'''
SELECTION = '''
from dataclasses import dataclass
from typing import ClassVar

from xprune import Plan, Selection


@dataclass(frozen=True)
class Greedy(Selection):
    """Takes the worst unit of the fullest site, until the budget is met."""

    name: ClassVar[str] = "greedy"

    def select(self, context, scores, costs, budget):
        limits, kept = costs.limits(budget), [site.size for site in costs.sites]
        while any(cost.total(kept) > allowed for _, cost, allowed in limits):
            site = max(range(len(kept)), key=lambda i: kept[i] / costs.sites[i].size)
            kept[site] -= 1
        keeps = [sorted(v.argsort(descending=True)[:n].tolist()) for v, n in zip(scores.values, kept)]
        return Plan(costs.sites, tuple(map(tuple, keeps)), {"selection": self.name})
'''
RUN = """
import json, sys
import torch
from torch import nn
import xprune
from toy.model import CausalSelfAttention
from xprune.testing import check_exact

torch.manual_seed(0)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 12)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.head = CausalSelfAttention(4, 12), Mlp(), nn.Linear(12, 2)

    def forward(self, x):
        x = x + self.attn(x)
        return self.head((x + self.mlp(x)).mean(1))


model, x, y = Model(), torch.randn(8, 5, 12), torch.arange(8) % 2
sites = xprune.find_sites(model, x[:2], units=["head", "pair"])
budget = xprune.Budget(resources={"activations": 0.7})
pruner = xprune.Pruner(model, "last-first,scale=2.0", budget, "greedy", finetune=None, sites=sites)
result = pruner.run([(x, y)])
check_exact(model, result.plan, x)
dense, pruned = (result.metrics[stage].costs for stage in ("dense", "pruned"))
page = result.report(sys.argv[1] + "/report.html").read_text()
result.save(sys.argv[1] + "/saved")
again = xprune.PruneResult.load(sys.argv[1] + "/saved", model_fn=Model)
print(json.dumps({
    "sites": {site.name: [site.kind, site.adapter] for site in sites},
    "shares": {name: pruned[name] / dense[name] for name in dense},
    "counts": result.plan.counts,
    "summary": result.summary(),
    "page": page,
    "same": bool(torch.equal(again.model(x), result.model(x))) and again.plan == result.plan,
    "reloaded": again.metrics["pruned"].costs == pruned,
}))
"""
GROUPS = {
    "adapters": ("nanogpt", "toy.adapter:NANOGPT"),
    "unit_kinds": ("pair", "toy.pairs:PAIR"),
    "resources": ("activations", "toy.activations:ACTIVATIONS"),
    "criteria": ("last-first", "toy.criterion:LastFirst"),
    "selections": ("greedy", "toy.selection:Greedy"),
}
"""Group -> (name, where the plug-in is)."""


def distribution(folder: Path, groups=GROUPS) -> Path:
    """A folder as pip would leave it: the package `toy`, with the files of docs/adapters.md, and its entry points."""
    package, info = folder / "toy", folder / "toy-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    files = {name: text for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL)}
    files |= {"__init__.py": "", "criterion.py": CRITERION, "selection.py": SELECTION}
    for name, text in files.items():
        text = text.replace("from model import", "from toy.model import").replace('"model.', '"toy.model.')
        (package / name).write_text(text.replace('xprune.ADAPTERS["nanogpt"] = NANOGPT', ""))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    points = [f"[xprune.{group}]\n{name} = {where}\n" for group, (name, where) in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(points))
    return folder


def test_a_whole_run_with_a_plug_in_of_each_kind(new_process, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("plotly")
    done = new_process(RUN, tmp_path, path=[distribution(tmp_path)])
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["sites"] == {"attn": ["head", "nanogpt"], "mlp:pairs": ["pair", ""]}
    assert said["counts"][0] < 4 and said["counts"][1] < 16
    assert 0.5 < said["shares"]["activations"] <= 0.7
    assert said["same"] and said["reloaded"]
    for name in ("activations", "pairs"):
        assert name in said["summary"]
    for name in (
        "activations",
        "last-first",
        "greedy",
        "pairs",
        "Numbers that linear layers write",
        "two neighbouring",
    ):
        assert name in said["page"], name
    cut = round(100 * (1 - said["shares"]["activations"]))
    assert f"{cut}\N{NO-BREAK SPACE}% of the activations cut" in said["page"]


def test_the_command_line_lists_them(new_process, tmp_path):
    code = "import runpy; runpy.run_module('xprune', run_name='__main__', alter_sys=True)"
    done = new_process(code, "list", path=[distribution(tmp_path)])
    assert done.returncode == 0, done.stderr
    for name, _ in GROUPS.values():
        assert name in done.stdout
    assert "unit kinds" in done.stdout and "resources" in done.stdout


@pytest.mark.parametrize(
    ("group", "name", "where", "says"),
    [
        ("unit_kinds", "pair", "toy.pairs:Pair", "wanted an instance of xprune.UnitKind"),
        ("criteria", "pair", "toy.pairs:PAIR", "wanted a subclass of xprune.Criterion"),
        ("resources", "lost", "toy.nowhere:LOST", "cannot be loaded: ModuleNotFoundError"),
        ("resources", "lost", "toy.activations:LOST", "cannot be loaded: AttributeError"),
    ],
)
def test_a_plug_in_that_is_none_is_named(group, name, where, says, new_process, tmp_path):
    folder = distribution(tmp_path, {group: (name, where)})
    code = f"import xprune\ntry: list(xprune.{group.upper()})\nexcept xprune.PluginError as error: print(error)"
    for _ in range(2):
        code += f"\ntry: list(xprune.{group.upper()})\nexcept xprune.PluginError as error: print(error)"
    done = new_process(code, path=[folder])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(says) == 3 and done.stdout.count(where) == 3, "said at every look"


def test_a_name_that_is_taken_is_refused(new_process, tmp_path):
    folder = distribution(tmp_path, {"resources": ("mine", "toy.activations:ACTIVATIONS")})
    path = folder / "toy" / "activations.py"
    path.write_text(path.read_text().replace('name = "activations"', 'name = "macs"'))
    code = (
        "import xprune\ntry: xprune.Budget(resources={'macs': 0.5})\nexcept xprune.PluginError as error: print(error)"
    )
    assert "called 'macs' like" in new_process(code, path=[folder]).stdout
