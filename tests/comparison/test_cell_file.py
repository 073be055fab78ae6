"""Tests that a comparison keeps a cell only for the same model, sites, data and settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import xprune
from tests.support.models import build, images, loader
from xprune.comparison.cell_file import CellFile
from xprune.modules.digest import digest_of, structure_digest, values_digest

RESULTS = sorted((Path(__file__).parents[2] / "docs" / "results").rglob("comparison.json"))


def grid(**changes):
    settings = {"criteria": {"chance": "random"}, "seeds": (0,), "budgets": (xprune.Budget(macs=0.6),)}
    return xprune.Grid(**{**settings, "finetune": None, **changes})


def case(**changes):
    return replace(xprune.Case(build("vit"), loader(16, 8), loader(14, 7)), **changes)


def permuted():
    """Returns the model with two biases exchanged. Sums over its weights are the same."""
    model = build("vit")
    with torch.no_grad():
        model.head.bias[:2] = model.head.bias[:2].flip(0)
    return model


def other_norm():
    model = build("vit")
    model.norm.eps = 0.1
    return model


def other_plain_number():
    model = build("vit")
    model.blocks[0].attn.scale *= 2
    return model


class Milder(xprune.Classification):
    """A task that differs from Classification."""


OTHERS = {
    "weights": (lambda: case(model=permuted()), grid),
    "structure": (lambda: case(model=other_norm()), grid),
    "structure, a number": (lambda: case(model=other_plain_number()), grid),
    "sites": (lambda: case(exclude=["blocks.0.attn"]), grid),
    "kinds of unit": (lambda: case(units=["neuron"]), grid),
    "training data": (lambda: case(train=loader(24, 8)), grid),
    "a training value": (lambda: case(train=[(x * 1.5, y) for x, y in loader(16, 8)]), grid),
    "held-out data": (lambda: case(held_out=loader(21, 7)), grid),
    "a held-out label": (lambda: case(held_out=[(x, (y + 1) % 7) for x, y in loader(14, 7)]), grid),
    "task": (case, lambda: grid(task=Milder())),
}
SETTINGS = {
    "criterion": lambda: grid(criteria={"chance": "magnitude"}),
    "a criterion's setting": lambda: grid(criteria={"chance": "magnitude,p=1"}),
    "selection": lambda: grid(selections={"global": "uniform"}),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return folder / "comparison.json", xprune.compare(case(), grid(), folder)


@pytest.fixture
def out(kept, tmp_path):
    (tmp_path / "comparison.json").write_text(kept[0].read_text())
    return tmp_path


def timeless(rows):
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]


def test_the_same_is_not_run_again(kept, out, monkeypatch):
    monkeypatch.setattr("xprune.comparison.grid._Seed.cell", lambda *_: pytest.fail("every cell is there"))
    # A loader that shuffles now draws another order. The data are the same.
    torch.rand(5)
    shuffled = case(train=loader(16, 8))
    assert xprune.compare(shuffled, grid(), out).rows == kept[1].rows


def test_a_shuffling_loader_is_known_again(tmp_path, monkeypatch):
    made = [case(train=loader(16, 8, shuffle=True)) for _ in range(2)]
    first = xprune.compare(made[0], grid(), tmp_path)
    torch.rand(5)
    monkeypatch.setattr("xprune.comparison.grid._Seed.cell", lambda *_: pytest.fail("every cell is there"))
    assert xprune.compare(made[1], grid(), tmp_path).rows == first.rows


@pytest.mark.parametrize("what", [*OTHERS, *SETTINGS])
def test_what_differs_is_run_under_a_key_of_its_own(what, kept, out, monkeypatch, capsys):
    other_case, other_grid = OTHERS[what] if what in OTHERS else (case, SETTINGS[what])
    found = xprune.compare(other_case(), other_grid(), out)
    old, new = list(kept[1].rows), list(found.rows)
    pruned = [row for row in new if row["criterion"] != "dense"]
    assert all(row not in old for row in (pruned if what in SETTINGS else new)), "no old row is shown"
    assert len({(row["seed"], row["criterion"], row["selection"], row["budget"]) for row in new}) == len(new)
    report = json.loads((out / "comparison.json").read_text())
    assert report["rows"] == new
    assert all(row in [*report["rows"], *report["others"]] for row in old if row not in new), "and none is lost"
    if what in ("weights", "sites", "training data", "held-out data", "task"):
        assert f"have other {what}" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("xprune.comparison.grid._Seed.cell", lambda *_: pytest.fail("the old cells are there again"))
    assert [row for row in xprune.compare(case(), grid(), out).rows if row in old] == old


def test_rows_of_another_budget_stay_beside(kept, out):
    found = xprune.compare(case(), grid(budgets=(xprune.Budget(macs=0.5),)), out)
    assert list(found.rows)[: len(kept[1].rows)] == list(kept[1].rows) and len(found.rows) == len(kept[1].rows) + 1


def test_seeds_that_have_a_case_of_their_own_are_told_apart(tmp_path):
    models = {0: build("vit"), 1: permuted()}
    both = xprune.compare(lambda seed: case(model=models[seed]), grid(seeds=(0, 1)), tmp_path)
    assert len({row["subject"] for row in both.rows}) == 2
    one = xprune.compare(lambda seed: case(model=models[1 - seed]), grid(seeds=(1,)), tmp_path)
    assert {row["seed"] for row in one.rows} == {1}, "of seed 0 nobody has said what it is now"
    assert not [row for row in one.rows if row in both.rows]


def test_rows_of_an_older_version_are_kept_and_not_shown(kept, out, capsys):
    path = out / "comparison.json"
    report = json.loads(path.read_text())
    old = {"settings": report["settings"], "hardware": {}, "versions": {}}
    old["rows"] = [{k: v for k, v in row.items() if k not in ("subject", "cell")} for row in report["rows"]]
    path.write_text(json.dumps(old))
    found = xprune.compare(case(), grid(), out)
    assert "were made by an older version" in " ".join(capsys.readouterr().out.split())
    assert timeless(found.rows) == timeless(report["rows"]), "run again"
    assert json.loads(path.read_text())["others"] == old["rows"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_files_of_older_versions_make_tables_and_pictures(path, tmp_path):
    report = json.loads(path.read_text())
    found = xprune.Comparison(tuple(report["rows"]), report)
    assert found.markdown().count("\n") == found.table().row_count + 2
    pytest.importorskip("matplotlib")
    assert found.plot(tmp_path / "accuracy.png").is_file()


@pytest.mark.parametrize("text", ["", "junk", "[]", '{"rows": []}', '{"settings": {}, "rows": [1]}'])
def test_what_is_no_comparison_is_refused(text, tmp_path):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(xprune.ArtefactError, match="not a comparison"):
        xprune.compare(case(), grid(), tmp_path)


def test_the_file_is_written_whole_or_not_at_all(kept, out, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    before = (out / "comparison.json").read_bytes()
    keeper = CellFile(out / "comparison.json", {"finetune": None})
    monkeypatch.setattr("xprune.comparison.cell_file.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        keeper.write()
    assert (out / "comparison.json").read_bytes() == before


def test_digests_tell_what_differs_and_nothing_else():
    model = build("vit")
    assert values_digest(model) == values_digest(build("vit").train()) != values_digest(permuted())
    assert structure_digest(model) == structure_digest(permuted().train())
    assert len({structure_digest(m) for m in (model, other_norm(), other_plain_number())}) == 3
    pairs = [
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"b": 1}),
        (1, 1.0),
        (1, True),
        ("1", 1),
        ((lambda x: x + 1), (lambda x: x - 1)),
        (xprune.Finetune(), xprune.Finetune(lr=1e-3)),
        (nn.ReLU(), nn.GELU()),
        (images(), images(seed=1)),
    ]
    for a, b in pairs:
        assert digest_of(a) == digest_of(a) != digest_of(b), (a, b)
    round_trip: dict = {}
    round_trip["itself"] = round_trip
    assert digest_of(round_trip) == digest_of(round_trip)
