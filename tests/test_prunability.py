"""Tests what `python -m benchmarks.prunability --library` measures with: builder, counts, rows and child processes."""

import os
import time

import pytest
import torch
from torch import nn

from benchmarks import prunability_sweep
from benchmarks.children import in_children
from benchmarks.expected_units import Expected, expected_units
from benchmarks.model_rows import compare_with_sites, gates_of, measure, one_unit, worst
from benchmarks.prunability_sweep import line, markdown, summary, verdict
from benchmarks.transformers_inputs import BATCH
from benchmarks.transformers_models import LARGEST, TYPES, NotBuilt, build
from xprune.core.site import Cut, Site


@pytest.mark.parametrize("name", ["llama", "vit", "t5"])
def test_a_type_is_built_small_and_always_the_same(name):
    model, inputs, _ = build(name)
    assert sum(p.numel() for p in model.parameters()) < LARGEST / 20
    assert all(len(value) == BATCH for value in inputs.values())
    again = build(name)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])
    assert all(torch.equal(value, again.inputs[key]) for key, value in inputs.items())


def test_a_type_that_is_not_built_has_a_reason():
    assert len(TYPES) > 500
    with pytest.raises(NotBuilt, match="a name of timm"):
        build("timm_wrapper")


class Attention(nn.Module):
    """A self-attention. Its output may be multiplied by a gate, which is no MLP."""

    def __init__(self, heads=2, gate=False, soft=True):
        super().__init__()
        self.heads, self.gated, self.soft = heads, gate, soft
        self.qkv, self.gate, self.proj = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2)
        x = ((scores.softmax(-1) if self.soft else scores) @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj(x * self.gate(x).sigmoid() if self.gated else x)


class Gated(nn.Module):
    """An MLP whose hidden features are the product of two layers."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """The experts of a mixture, in two three-dimensional weights."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = (
            nn.Parameter(torch.randn(3, 8, 6)),
            nn.Parameter(torch.randn(3, 6, 8)),
        )

    def forward(self, x):
        return (torch.einsum("bnc,ecf->ebnf", x, self.up_proj).relu() @ self.down_proj[:, None]).sum(0)


class _Root(nn.Sequential):
    """A model with one module. Attentions of torch get their input three times."""

    def forward(self, x):
        return self[0](x, x, x) if isinstance(self[0], nn.MultiheadAttention) else self[0](x)


COUNTS = {
    "attention": (Attention(), Expected(attentions={"0": 2})),
    "gated attention": (Attention(gate=True), Expected(attentions={"0": 2})),
    "one head": (Attention(heads=1), Expected(single=["0"])),
    "linear attention": (Attention(soft=False), Expected(others={"0": "products without a softmax"})),
    "nn.MultiheadAttention": (nn.MultiheadAttention(8, 4), Expected(attentions={"0": 4})),
    "MLP": (nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Dropout(), nn.Linear(6, 8)), Expected(mlps={"0.3": ["0.0"]})),
    "no nonlinearity": (nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)), Expected()),
    "gated MLP": (Gated(), Expected(mlps={"0.down": ["0.gate", "0.up"]})),
    "experts": (Experts(), Expected(experts=["0"])),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_units_are_counted_without_xprune(name):
    module, expected = COUNTS[name]
    assert expected_units(_Root(module).eval(), torch.randn(2, 5, 8)) == expected


def test_sites_are_compared_with_the_expected_units():
    expected = Expected(
        attentions={"a.self": 2, "b.self_attn": 2, "b.cross_attn": 2},
        mlps={"a.fc2": ["a.fc1"], "b.fc2": ["b.fc1"]},
        experts=["c.experts"],
    )
    sites = [
        Site("a", "head", 2, 4, ("a.output",), cuts=(Cut("a.self.q.weight", 0),)),
        Site("b.self_attn", "head", 2, 4, ("b.self_attn.o",), cuts=(Cut("b.self_attn.q.weight", 0),)),
        Site("a.fc1", "neuron", 6, 1, ("a.fc2",), cuts=(Cut("a.fc1.weight", 0),)),
    ]
    found, missing = compare_with_sites(expected, sites)
    # The site of `b.self_attn` does not count for `b.cross_attn`.
    assert missing == ["b.cross_attn", "b.fc2", "c.experts"]
    assert found == {"attentions": 2, "mlps": 1}
    assert one_unit(sites).keeps == ((1,), (1,), (5,))
    assert [gate.tolist() for gate in gates_of(one_unit(sites[:1]))] == [[0, 1]]


def test_outputs_are_compared_by_their_own_size():
    one = torch.tensor([2.0, float("-inf")])
    assert worst([one], [one.clone()]) == 0
    assert worst([one], [torch.tensor([1.0, float("-inf")])]) == pytest.approx(0.5)
    assert worst([one], [torch.tensor([2.0, 0.0])]) == worst([one], []) == float("inf")


@pytest.mark.parametrize("name, generated", [("gpt2", "equal"), ("vit", "")])
def test_a_row_says_what_was_exact_saved_and_generated(name, generated):
    rows = []
    measure({"type": name, "seconds": 1}, lambda: build(name)[:2], lambda row: rows.append(dict(row)))
    row = rows[-1]
    assert row["step"] == "done" and verdict(row) == "exact"
    assert row["attentions"] == row["mlps"] == {"expected": 2, "found": 2, "exact": 2}
    assert row["foreign"] == [] and row["missing"] == {} and row["single"] == []
    assert {plan["result"] for plan in row["plans"].values()} == {"exact"} and len(row["plans"]) == 3
    assert (row["saved"], row["generated"]) == ("exact", generated)
    # Rows of a child that is killed later are complete up to the step that was killed.
    assert [each["step"] for each in rows][:2] == ["find_sites", "plans"]
    assert f"{name} " in line(row) and name in markdown(rows[-1:])


_COUNT = {"expected": 2, "found": 2, "exact": 2}
_FEW = {"expected": 2, "found": 1, "exact": 1}
_PLANS = {"one": {"result": "exact"}}
VERDICTS = [
    ({"not built": "why"}, "not built"),
    ({"timeout": True, "plans": _PLANS}, "timeout"),
    ({"attentions": _COUNT, "mlps": _COUNT, "plans": _PLANS}, "exact"),
    ({"attentions": _FEW, "mlps": _COUNT, "plans": _PLANS}, "partly"),
    ({"attentions": _COUNT, "mlps": _COUNT, "plans": {"one": {"result": "refused", "reason": "why"}}}, "refused"),
    ({"attentions": _COUNT, "mlps": _COUNT, "plans": {"one": {"result": "wrong", "error": 1.0}}}, "wrong"),
    ({"attentions": _COUNT, "mlps": _COUNT, "refused": "why"}, "refused"),
    ({"attentions": _COUNT, "mlps": _COUNT, "plans": _PLANS, "foreign": ["save: KeyError"]}, "error"),
    ({"died": "SIGKILL"}, "error"),
    ({"attentions": {**_COUNT, "expected": 0}, "mlps": {**_COUNT, "expected": 0}, "refused": "why"}, "no units"),
]


@pytest.mark.parametrize("row, expected", VERDICTS)
def test_the_verdict_is_the_worst_that_happened(row, expected):
    row = {"type": "name", "seconds": 1, **row}
    assert verdict(row) == expected
    assert expected in line(row) and expected in markdown([row])
    assert any(f"1 {expected}" in text for text in summary([row]))


def _work(name, report):
    report({"type": name, "step": "first"})
    if name == "slow":
        time.sleep(30)
    if name == "dead":
        os.kill(os.getpid(), 9)
    if name == "wrong":
        raise ValueError("no")
    report({"type": name, "step": "done"})


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_child_that_fails_takes_nothing_with_it(jobs):
    names = ["fine", "slow", "dead", "wrong", "last"]
    rows = {row.pop("type"): row for row in in_children(names, _work, jobs, seconds=1)}
    assert {name: row.pop("seconds") < 3 for name, row in rows.items()} == dict.fromkeys(names, True)
    assert rows == {
        "fine": {"step": "done"},
        "slow": {"step": "first", "timeout": True},
        "dead": {"step": "first", "died": "SIGKILL"},
        "wrong": {"step": "first", "died": "ValueError: no"},
        "last": {"step": "done"},
    }


def test_a_rerun_with_only_keeps_the_other_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(prunability_sweep, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)
    monkeypatch.setattr(prunability_sweep, "builders", lambda _: dict.fromkeys(["b", "a", "ab"]))
    seen = []

    def children(names, *_):
        seen.append(list(names))
        return [
            {"type": name, "library": "own", "not built": f"run {len(seen)}", "seconds": 0.1} for name in names[::-1]
        ]

    monkeypatch.setattr(prunability_sweep, "in_children", children)
    for only in ("", "a", "b,"):
        prunability_sweep.sweep("own", only, 1, 1, 1, None)
    assert seen == [["b", "a", "ab"], ["a", "ab"], ["b"]]
    rows = prunability_sweep.json.loads((tmp_path / "prunability-own.json").read_text())["rows"]
    assert [(row["type"], row["not built"]) for row in rows] == [("b", "run 3"), ("a", "run 2"), ("ab", "run 2")]
    assert "3 types, 0 built: 3 not built" in (tmp_path / "prunability-own.md").read_text()
