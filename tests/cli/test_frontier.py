"""Tests the command `xprune frontier` on a folder of images."""

import json

import xprune
from tests.cli.test_commands import ARGS, folder, run, weights

__all__ = ["folder", "weights"]


def words(folder, weights, out, *more):
    found = ["frontier", "--model", "vit_tiny_patch16_224", "--data", folder, "--checkpoint", weights, "--out", out]
    for key, value in ARGS.items():
        found += ["--model-arg", f"{key}={json.dumps(value)}"]
    return [*found, "--batch-size", "7", *more]


def test_frontier_writes_a_table_a_file_and_a_page(folder, weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "trade"
    more = ["--criterion", "xpruner,budgets=any,steps=6", "--share", "0.6", "--share", "0.4", "--no-latency"]
    assert run(monkeypatch, *words(folder, weights, out, *more)) == 0
    said = capsys.readouterr().out
    assert "Estimated time: about" in said and "60 %" in said and "The least that can be reached" in said
    found = xprune.Frontier.load(out / "frontier.json")
    assert [point.asked for point in found.points] == [0.6, 0.4] and found.dense.data == "validation"
    assert "Frontier of accuracy and cost" in (out / "frontier.html").read_text()


def test_files_of_others_are_refused_before_work(folder, weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "frontier.json").write_text("{}")
    assert run(monkeypatch, *words(folder, weights, tmp_path)) == 2
    said = capsys.readouterr()
    assert "did not write it" in " ".join(said.err.split()) and "Units cover" not in said.out


def test_a_budget_that_cannot_be_reached_is_one_message(folder, weights, tmp_path, monkeypatch, capsys):
    more = ["--criterion", "magnitude", "--share", "0.001", "--no-latency"]
    assert run(monkeypatch, *words(folder, weights, tmp_path / "out", *more)) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
