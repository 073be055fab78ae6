"""Tests which images `xprune evaluate` measures, and which `xprune prune` holds out, and that both say it."""

import re
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config

import xprune
from tests.support.models import CLASSES, SIZE, VIT, build, images
from xprune.cli.commands import main
from xprune.cli.inputs import dense_costs, dense_model, named_model
from xprune.data import load_data, load_measured
from xprune.testing import random_plan

ARGS = {**VIT, "num_classes": CLASSES}
ARCH = ("vit_tiny_patch16_224", ARGS)
WORDS = [word for key, value in ARGS.items() for word in ("--model-arg", f"{key}={value}")]


def fill(root, per_class, classes=CLASSES):
    chance = np.random.default_rng(0)
    for label in range(classes):
        for index in range(per_class):
            path = root / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return root


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["xprune", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def pruned(model=None, seed=3):
    model = build("vit") if model is None else model
    return xprune.apply(model, random_plan(xprune.find_sites(model, images()), seed, 0.0), images())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return xprune.save(pruned(), tmp_path_factory.mktemp("saved") / "model", arch=ARCH)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(build("vit").state_dict(), path)
    return path


# Name -> (folder -> images of each class, number of images that are measured, text that says which).
LAYOUTS = {
    "class folders": ({"": 3}, 21, r"of \S+, which has no splits"),
    "train and val": ({"train": 4, "val": 2}, 14, "of .*val$"),
    "train, val and test": ({"train": 4, "val": 2, "test": 3}, 14, "of .*val$"),
    "val alone": ({"val": 2}, 14, "of .*val$"),
    "validation alone": ({"validation": 2}, 14, "of .*validation$"),
    "test alone": ({"test": 3}, 21, "of .*test$"),
    "train and test": ({"train": 4, "test": 1}, 7, "of .*test$"),
}


def config():
    return resolve_model_data_config(build("vit"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_of_what_is_measured_is_said(layout, tmp_path):
    folders, count, says = LAYOUTS[layout]
    for name, per_class in folders.items():
        fill(tmp_path / name if name else tmp_path, per_class)
    found = load_measured(str(tmp_path), config())
    assert len(found.loader.dataset) == count and found.classes == CLASSES
    assert re.search(rf"all {count} images {says}", found.note)
    assert sum(len(labels) for _, labels in found.loader) == count


def test_the_command_says_it_and_counts_it(saved, tmp_path, monkeypatch, capsys):
    fill(tmp_path / "data", 3)
    assert run(monkeypatch, "evaluate", saved, "--data", tmp_path / "data") == 0
    shown = capsys.readouterr().out
    assert f"data: all 21 images of {tmp_path / 'data'}, which has no splits" in shown
    assert "measured on 21 given samples" in shown


def test_a_training_split_alone_is_refused_and_can_be_given_itself(tmp_path):
    fill(tmp_path / "train", 2)
    with pytest.raises(xprune.DataError, match=r"give .*train"):
        load_measured(str(tmp_path), config())
    assert len(load_measured(str(tmp_path / "train"), config()).loader.dataset) == 2 * CLASSES


def test_a_class_of_the_name_of_a_split_is_a_class(tmp_path):
    fill(tmp_path, 2)
    (tmp_path / "class0").rename(tmp_path / "train")
    assert load_measured(str(tmp_path), config()).classes == CLASSES
    assert load_data(str(tmp_path), config()).classes == CLASSES


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        ({"": 5}, r"has no train/ and val/: 3 of its 35 images, drawn at random with seed 0, are held out"),
        ({"train": 2, "val": 1}, r"14 images of .*train to learn from, 7 of .*val to measure on"),
        ({"train": 2, "test": 1}, r"14 images of .*train to learn from, 7 of .*test to measure on"),
    ],
)
def test_the_split_that_prune_makes_is_said(folders, says, tmp_path):
    for name, per_class in folders.items():
        fill(tmp_path / name if name else tmp_path, per_class)
    data = load_data(str(tmp_path), config())
    assert re.search(says, data.note)
    assert str(len(data.val.dataset)) in data.note


def test_shares_are_of_the_original_dense_model(saved, tmp_path):
    once, dense = xprune.load(saved), build("vit")
    truth = xprune.count_resources(dense, images())
    assert dense_costs(saved, images()) == truth
    twice = xprune.save(pruned(once, seed=5), tmp_path / "twice")
    assert dense_costs(twice, images()) == truth


def test_without_an_architecture_shares_are_of_what_was_measured_or_there_are_none(tmp_path):
    model = build("vit")
    with pytest.warns(UserWarning, match="architecture is not saved"):
        alone = xprune.save(pruned(model), tmp_path / "alone")
    assert dense_costs(alone, images()) == {}
    plan = random_plan(xprune.find_sites(model, images()), 3, 0.0)
    metrics = {"dense": xprune.Metrics(0.5, 1.0, 4, macs=40, params=30)}
    result = xprune.PruneResult(pruned(model), plan, xprune.Scores((), (), "none"), metrics)
    with pytest.warns(UserWarning, match="architecture is not saved"):
        assert dense_costs(result.save(tmp_path / "result"), images()) == {"macs": 40, "params": 30}


@pytest.mark.parametrize("which", ["saved", "dense"])
def test_the_table_shows_the_share(which, saved, weights, tmp_path, monkeypatch, capsys):
    fill(tmp_path / "data" / "val", 1)
    words = [saved] if which == "saved" else ["vit_tiny_patch16_224", "--checkpoint", weights, *WORDS]
    assert run(monkeypatch, "evaluate", *words, "--data", tmp_path / "data") == 0
    shares = [float(share) for share in re.findall(r"\(([\d.]+)%\)", capsys.readouterr().out)]
    model = xprune.load(saved) if which == "saved" else build("vit")
    macs = xprune.count_macs(model, images()) / xprune.count_macs(build("vit"), images())
    params = xprune.count_params(model) / xprune.count_params(build("vit"))
    assert shares == [pytest.approx(100 * macs, abs=0.06), pytest.approx(100 * params, abs=0.06)]


def test_a_saved_model_gives_its_own_arguments_to_the_dense_one(saved, weights):
    expected = build("vit").state_dict()
    for name, args in ((None, None), ("vit_tiny_patch16_224", None), ("vit_tiny_patch16_224", WORDS[1::2])):
        model = dense_model(saved, name, args, True, weights)
        assert all((tensor == expected[key]).all() for key, tensor in model.state_dict().items())
    assert dense_model(saved, None, None, True, None) is None


@pytest.mark.parametrize("more", [{"args": ["depth=3"]}, {"checkpoint": "weights.safetensors"}])
def test_a_saved_model_takes_no_arguments_besides_its_own(more, saved):
    with pytest.raises(xprune.ModelError, match="has its own arguments and weights"):
        named_model(str(saved), **more)


def test_sites_takes_the_options_of_the_others(weights, monkeypatch, capsys):
    assert run(monkeypatch, "sites", "--model", "vit_tiny_patch16_224", "--checkpoint", weights, *WORDS) == 0
    assert "blocks.1.mlp" in capsys.readouterr().out
