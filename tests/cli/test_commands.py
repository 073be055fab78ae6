"""Tests every command of the command line on a folder of images, and the messages for wrong arguments."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import xprune
from tests.support.models import CLASSES, SIZE, VIT, build
from xprune.artefact.libraries.timm import TIMM
from xprune.cli.commands import main
from xprune.cli.inputs import example_images, named_model

ARGS = {**VIT, "num_classes": CLASSES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with train/ and val/, a folder for each class, and images of several sizes."""
    root, chance = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in range(CLASSES):
            for index in range(count):
                pixels = chance.integers(0, 255, (40 + 3 * index, 50, 3), dtype=np.uint8)
                pixels[:, 4 * label : 4 * label + 4] = 255
                path = root / split / f"class{label}" / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(build("vit").state_dict(), path)
    return path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["xprune", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def prune(folder, weights, out, *more):
    words = ["prune", "--model", "vit_tiny_patch16_224", "--data", folder, "--checkpoint", weights, "--out", out]
    for key, value in ARGS.items():
        words += ["--model-arg", f"{key}={json.dumps(value)}"]
    return [*words, "--epochs", "1", "--batch-size", "7", *more]


@pytest.fixture(scope="module")
def saved(folder, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "pruned"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *prune(folder, weights, out), "--criterion", "xpruner,steps=30") == 0
    return out


def test_pruned_to_half_the_macs(saved):
    model, dense = xprune.load(saved), build("vit")
    x = torch.zeros(1, 3, SIZE, SIZE)
    assert 0.45 < xprune.count_macs(model, x) / xprune.count_macs(dense, x) <= 0.5


def test_every_command_on_what_was_saved(saved, folder, weights, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "show", saved) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("blocks.0.attn", "blocks.1.mlp", "dense", "finetuned", "xpruner"))
    assert run(monkeypatch, "evaluate", saved, "--data", folder) == 0
    assert "14 validation samples" in capsys.readouterr().out
    assert run(monkeypatch, "export", saved, "--out", tmp_path / "model.onnx") == 0
    assert (tmp_path / "model.onnx").is_file()
    page, dense = tmp_path / "report.html", ["--model", "vit_tiny_patch16_224", "--checkpoint", weights]
    for key, value in ARGS.items():
        dense += ["--model-arg", f"{key}={json.dumps(value)}"]
    assert run(monkeypatch, "report", saved, "--out", page, "--data", folder, *dense, "--faithfulness") == 0
    assert "contrast: own" in page.read_text()
    assert run(monkeypatch, "report", saved, "--faithfulness") != 0
    assert "needs data and the dense model" in " ".join(capsys.readouterr().err.split())
    again = tmp_path / "again"
    words = ["prune", "--model", saved, "--data", folder, "--params", "0.97", "--out", again, "--epochs", "0"]
    assert run(monkeypatch, *words, "--exclude", "blocks.0.attn", "--criterion", "magnitude") == 0
    first, second = (xprune.artefact.read_header(path)["plan"] for path in (saved, again))
    assert second["keeps"][0] == first["keeps"][0] and second["keeps"] != first["keeps"], (
        "blocks.0.attn was to be left alone"
    )


def test_compare_writes_a_table_a_picture_and_the_figures(folder, weights, tmp_path, monkeypatch, capsys):
    words = ["compare", *prune(folder, weights, tmp_path)[1:], "--seeds", "2", "--macs", "0.7", "--macs", "0.6"]
    words += ["--criterion", "random", "--criterion", "xpruner,steps=4,objective=label", "--selection", "learned"]
    words += ["--faithfulness"]
    assert run(monkeypatch, *words) == 0
    assert "xpruner,steps=4,objective=label" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.json", "table.md", "accuracy.png"}
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert len(rows) == 2 * (1 + 2 * 2)
    assert all(("deletion_gap" in row) == row["criterion"].startswith("xpruner") for row in rows)
    (tmp_path / "table.md").unlink()
    monkeypatch.setattr(
        sys.modules["xprune.comparison.grid"]._Seed, "cell", lambda *_: pytest.fail("every cell is there")
    )
    assert run(monkeypatch, *words) == 0 and (tmp_path / "table.md").is_file()


@pytest.mark.parametrize("other", ["--checkpoint", "--exclude"])
def test_compare_prints_no_row_of_another_model_or_other_sites(other, folder, weights, tmp_path, monkeypatch, capsys):
    words = ["compare", *prune(folder, weights, tmp_path)[1:], "--seeds", "1", "--macs", "0.7", "--epochs", "0"]
    assert run(monkeypatch, *words, "--criterion", "random", "--criterion", "magnitude") == 0
    path = tmp_path / "comparison.json"
    old = json.loads(path.read_text())["rows"]
    if other == "--checkpoint":
        model = build("vit")
        torch.nn.init.zeros_(model.head.weight)
        save_file(model.state_dict(), tmp_path.parent / "other.safetensors")
        words[words.index("--checkpoint") + 1] = tmp_path.parent / "other.safetensors"
    else:
        words += ["--exclude", "blocks.0.attn"]
    capsys.readouterr()
    assert run(monkeypatch, *words, "--criterion", "random") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "magnitude" not in shown and "3 rows have other" in shown
    report = json.loads(path.read_text())
    assert [row["criterion"] for row in report["rows"]] == ["dense", "random"]
    assert all(row in report["others"] and row not in report["rows"] for row in old)
    assert "magnitude" not in (tmp_path / "table.md").read_text()


def test_the_recipe_of_the_documentation_runs(folder, weights, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "imagenet.md").read_text()
    command = page.split("```")[1].replace("\\\n", " ").split("xprune prune ")[1]
    words = command[command.index("--macs") :].split()
    small = {"--macs": "0.6", "--criterion": "xpruner,steps=3", "--epochs": "2", "--batch-size": "7", "--workers": "0"}
    for option, value in {**small, "--checkpoint-dir": str(tmp_path / "state")}.items():
        words[words.index(option) + 1] = value
    out = tmp_path / "pruned"
    assert run(monkeypatch, *prune(folder, weights, out), *words) == 0
    extra = xprune.artefact.read_header(out)["extra"]
    assert extra["criterion"] == "xpruner" and xprune.artefact.read_header(out)["plan"]["info"]["updates"] > 0


def test_sites_says_what_can_go(monkeypatch, capsys):
    cait = ("--model-arg", "img_size=32", "--model-arg", "patch_size=8", "--model-arg", "embed_dim=24")
    cait += ("--model-arg", "depth=1", "--model-arg", "num_heads=3")
    monkeypatch.setenv("COLUMNS", "200")
    run(monkeypatch, "sites", "--model", "cait_xxs24_224", *cait)
    out = " ".join(capsys.readouterr().out.split())
    assert "blocks.0.mlp" in out and "96 neurons" in out
    assert "% of the model's MACs (" in out and "left alone" in out
    run(monkeypatch, "sites", "--model", "cait_xxs24_224", *cait, "--inside", "blocks.[0].*")
    out = capsys.readouterr().out
    assert "MACs inside blocks.[0].* (1 site). This part has" in out and "blocks_token_only" not in out


def test_a_part_is_pruned(folder, weights, tmp_path, monkeypatch, capsys):
    out, part = tmp_path / "pruned", ["--inside", "blocks.1.*", "--of", "part", "--macs", "0.6"]
    words = [*prune(folder, weights, out), *part, "--epochs", "0", "--criterion", "magnitude"]
    assert run(monkeypatch, *words) == 0
    shown = capsys.readouterr().out
    assert "MACs inside blocks.1.* (2 sites). This part has" in shown
    assert "The budget is that of the part blocks.1.*: the plan keeps" in shown
    assert run(monkeypatch, "show", out) == 0
    assert "MACs inside blocks.1.* (2 sites). This part has" in capsys.readouterr().out
    words = ["compare", *prune(folder, weights, tmp_path / "grid")[1:], *part, "--seeds", "1", "--epochs", "0"]
    assert run(monkeypatch, *words, "--criterion", "random") == 0
    assert "MACs inside blocks.1.* (2 sites)" in capsys.readouterr().out
    assert "MACs inside blocks.1.* (2 sites)" in (tmp_path / "grid" / "table.md").read_text()
    for wrong, says in (("blocs.*", "matches no module"), ("head", "has no sites of units head, neuron inside head")):
        words = [*prune(folder, weights, tmp_path / "none"), "--inside", wrong, "--epochs", "0"]
        assert run(monkeypatch, *words) != 0
        assert says in " ".join(capsys.readouterr().err.split())


def test_images_are_of_the_size_and_channels_that_the_model_was_built_for():
    model, arch = named_model("visformer_tiny", ["img_size=64", "in_chans=1"], False, None)
    for found in (model, TIMM.build(*arch)):
        assert example_images(found, 2).shape == (2, 1, 64, 64)
        found.eval()(example_images(found, 2))


def test_list_names_every_plug_in(monkeypatch, capsys):
    assert run(monkeypatch, "list") == 0
    shown = capsys.readouterr().out
    for name in (*xprune.CRITERIA, *xprune.SELECTIONS, *xprune.ADAPTERS, *xprune.UNIT_KINDS, *xprune.RESOURCES):
        assert name in shown


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--criterion", "taylr"], "taylor"),
        (["--selection", "best"], "uniform"),
        (["--macs", "1.5"], "(0, 1]"),
        (["--limit", "watts=0.5"], "known: macs, params"),
        (["--limit", "params"], "not of the form RESOURCE=FRACTION"),
        (["--limit", "params=2"], "(0, 1]"),
        (["--macs", "0.001"], "the least is"),
        (["--units", "channels"], "head, neuron"),
        (["--exclude", "blok.*"], "blok.*"),
        (["--model-arg", "num_classes=3"], "cannot build"),
        (["--model-arg", "num_classes"], "key=value"),
        (["--data", "digits"], "num_classes=10"),
        (["--model", "vit_of_nobody"], "timm.list_models()"),
        (["--data", "nowhere"], "digits"),
        (["--mixed-precision", "fp4"], "mixed_precision"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typing_error_is_one_message(change, says, folder, weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "pruned"
    assert run(monkeypatch, *prune(folder, weights, out, *change)) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "Error" in shown and says in shown
    assert "Traceback" not in shown
    assert not out.exists()


def test_a_foreign_output_directory_is_refused_before_work(folder, weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(xprune.Pruner, "run", lambda *_: pytest.fail("the work has begun"))
    assert run(monkeypatch, *prune(folder, weights, tmp_path)) == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert "did not write: thesis.txt" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["show", "evaluate", "export"])
def test_what_is_no_artefact_is_refused(command, tmp_path, monkeypatch, capsys):
    more = {"evaluate": ["--data", "digits"], "export": ["--out", tmp_path / "m.onnx"]}.get(command, [])
    assert run(monkeypatch, command, tmp_path, *more) == 2
    assert "is no saved model" in " ".join(capsys.readouterr().err.split())


def test_started_as_a_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "xprune", "list"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "taylor" in done.stdout


def test_a_name_that_timm_knows_builds_what_the_header_says(saved):
    arch = xprune.artefact.read_header(saved)["arch"]
    assert timm.is_model(arch["name"])
    assert {name: arch["kwargs"][name] for name in ARGS} == ARGS


def test_the_names_of_class_folders_are_saved_with_the_model(saved):
    result = xprune.PruneResult.load(saved)
    assert result.class_names == tuple(f"class{label}" for label in range(CLASSES))
    assert result.settings["task"] == "classification"


def test_a_task_by_name(folder, weights, tmp_path, monkeypatch, capsys):
    more = ["--criterion", "taylor", "--task", "embeddings,measure=similarity", "--no-latency"]
    # The logits are the embeddings here, and the class folders are ignored.
    assert run(monkeypatch, *prune(folder, weights, tmp_path / "pruned", *more)) == 0
    assert "similarity" in capsys.readouterr().out
    result = xprune.PruneResult.load(tmp_path / "pruned")
    assert result.settings["task"] == "embeddings" and result.scores.classwise is None
    assert result.metrics["dense"].metric == pytest.approx(1)
    for command in ("evaluate", "report"):
        assert run(monkeypatch, command, tmp_path / "pruned", "--data", folder) == 2
        assert "was pruned with the task 'embeddings'" in capsys.readouterr().err
    assert run(monkeypatch, "show", tmp_path / "pruned") == 0


@pytest.mark.parametrize(
    "task, says",
    [
        ("dogs", "unknown task 'dogs'"),
        ("regression,measure=MSE", "Regression knows R2, MAE, RMSE"),
        ("multi-label", "If each sample has one class"),
    ],
)
def test_a_wrong_task_is_one_message(task, says, folder, weights, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *prune(folder, weights, tmp_path / "pruned", "--task", task)) == 2
    assert says in capsys.readouterr().err
