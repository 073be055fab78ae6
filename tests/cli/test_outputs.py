"""Tests that no command replaces a file that xprune did not write, for every value of --out."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import xprune
from tests.support.models import CLASSES, VIT, build, images
from xprune.artefact.files import is_page, is_stamped
from xprune.cli import demo
from xprune.cli.commands import _save, main
from xprune.comparison.plots import draw, is_drawn
from xprune.comparison.table import Comparison
from xprune.testing import random_plan

ARCH = ("vit_tiny_patch16_224", {**VIT, "num_classes": CLASSES})


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["xprune", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def result():
    torch.manual_seed(0)
    model = build("vit")
    sites = xprune.find_sites(model, images())
    scores = xprune.Scores(tuple(sites), tuple(torch.rand(site.size) for site in sites), "random")
    plan = random_plan(sites, 3, 0.0)
    metrics = {"dense": xprune.Metrics(0.5, 1.0, 4, macs=4, params=4), "pruned": xprune.Metrics(0.4, 1.0, 4, macs=2)}
    return xprune.PruneResult(xprune.apply(model, plan, images()), plan, scores, metrics)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return result().save(tmp_path_factory.mktemp("saved") / "model", arch=ARCH)


@pytest.mark.parametrize("command", ["report", "export"])
@pytest.mark.parametrize("text", ["mine", ""])
def test_a_file_of_the_user_stays(command, text, saved, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text(text)
    assert run(monkeypatch, command, saved, "--out", mine) == 2
    assert "mine.html exists, and xprune did not write it" in " ".join(capsys.readouterr().err.split())
    assert mine.read_text() == text and [path.name for path in tmp_path.iterdir()] == ["mine.html"]
    assert run(monkeypatch, command, saved, "--out", tmp_path) == 2
    assert "is a folder, wanted a file" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["report", "export"])
def test_what_the_command_wrote_itself_is_written_anew(command, saved, tmp_path, monkeypatch):
    out = tmp_path / "new" / "out"
    for _ in range(2):
        assert run(monkeypatch, command, saved, "--out", out) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_report_beside_the_model_and_a_new_model_in_its_place(tmp_path, monkeypatch):
    folder = result().save(tmp_path / "model", arch=ARCH)
    assert run(monkeypatch, "report", folder) == 0 and is_page(folder / "report.html")
    with pytest.warns(UserWarning, match="describes the model that was there before"):
        result().save(folder, arch=ARCH)
    assert run(monkeypatch, "report", folder) == 0


def test_a_warning_is_one_message(saved, monkeypatch, capsys):
    def report(*_, **__):
        warnings.warn("something [odd]", stacklevel=1)

    monkeypatch.setattr(xprune.PruneResult, "report", report)
    shown = warnings.showwarning
    assert run(monkeypatch, "report", saved, "--out", saved.parent / "page.html") == 0
    assert capsys.readouterr().err.splitlines()[-1] == "UserWarning: something [odd]"
    assert warnings.showwarning is shown


def test_pages_of_older_versions_are_known(tmp_path):
    page = result().report(tmp_path / "page.html")
    older = page.read_text().rpartition("<!-- written by xprune")[0]
    page.write_text(older)
    assert is_page(page) and not is_stamped(page)


@pytest.mark.parametrize(("name", "content"), [("table.md", b"# my notes\n"), ("accuracy.png", b"a picture of mine")])
def test_compare_refuses_to_replace_a_table_or_picture(name, content, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(xprune, "compare", lambda *_, **__: pytest.fail("the work has begun"))
    assert run(monkeypatch, "compare", "--model", "vit_of_nobody", "--data", "digits", "--out", tmp_path) == 2
    assert f"{name} exists, and xprune did not write it" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / name).read_bytes() == content


def test_a_picture_of_ours_is_told_from_another(tmp_path):
    row = {"seed": 0, "metric": 0.5, "loss": 1.0, "macs": 1.0, "params": 1.0}
    rows = (
        {**row, "criterion": "dense", "selection": "", "budget": ""},
        {
            **row,
            "criterion": "random",
            "selection": "global",
            "budget": "macs 0.5",
        },
    )
    drawn = draw(Comparison(rows, {}), tmp_path / "accuracy.png")
    assert is_drawn(drawn)
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    assert not is_drawn(tmp_path / "other.png") and not is_drawn(tmp_path / "nowhere.png")


def test_work_is_saved_beside_a_folder_that_was_filled_meanwhile(tmp_path, capsys):
    out = tmp_path / "pruned"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    (tmp_path / "pruned-2").mkdir()
    assert _save(result(), out, ARCH) == tmp_path / "pruned-3"
    assert xprune.load(tmp_path / "pruned-3") is not None and [path.name for path in out.iterdir()] == ["notes.md"]
    assert "saved in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo-pruned/notes.md", "demo-pruned.html", "demo-pruned"])
def test_the_demo_refuses_before_it_trains(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    monkeypatch.setattr(demo, "dense_model", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(xprune.ArtefactError):
        demo.run(tmp_path / "demo-pruned", None, None)
    assert path.read_text() == "mine"


def test_what_the_demo_leaves_is_ignored_by_git():
    ignored = (Path(__file__).parents[2] / ".gitignore").read_text().split()
    assert {"/demo-pruned/", "/demo-pruned.html"} <= set(ignored)
