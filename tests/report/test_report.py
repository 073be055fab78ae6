"""Tests the contents of the report of a real run, and the errors for results that it cannot show."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

import xprune
from benchmarks.report_page import synthetic
from tests.support.models import CLASSES, VIT, build, images, loader
from xprune.cli.commands import main
from xprune.report.attention import attention

pytest.importorskip("jinja2")
pytest.importorskip("plotly")


def test_percentiles_of_a_class_are_ranks(result):
    from xprune.report.classmap import percentiles, single_map

    table = torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 0.0], [torch.nan] * 3])
    assert percentiles(table).nan_to_num(-1).tolist() == [[100, 0, 50], [75, 75, 0], [-1, -1, -1]]
    found = single_map(result, xprune.UNIT_KINDS["head"])
    column = found.labels.index("blocks.1.attn, head 2")
    heads = torch.cat([table for table in result.scores.classwise if table.shape[1] == VIT["num_heads"]], 1)
    order = heads[0].argsort().argsort()
    assert found.values[0, column] == pytest.approx(100 * float(order[column]) / (heads.shape[1] - 1))
    assert found.kept[column] == (2 in result.plan.keeps[2])


def test_accuracy_by_class_adds_up(result):
    for metrics in result.metrics.values():
        assert sum(n for _, n in metrics.by_class) == metrics.samples
        assert sum(a * n for a, n in metrics.by_class) / metrics.samples == pytest.approx(metrics.accuracy)
    x, y = (torch.cat(parts) for parts in zip(*loader(32), strict=True))
    right = (result.model(x).argmax(-1) == y)[y == 3].float().mean()
    assert list(result.metrics.values())[-1].by_class[3][0] == pytest.approx(float(right))


@pytest.mark.parametrize("criterion", ["taylor", "captum:Saliency", "xpruner,steps=4,objective=label", "magnitude"])
def test_classes_that_no_sample_told_of_are_named(criterion, tmp_path):
    data = [(images(4), torch.tensor([0, 0, 2, 2]))]
    result = xprune.Pruner(build("vit"), criterion, finetune=None).run(data)
    told = "5 of 7 classes have no class-wise scores (1, 3, 4, 5, 6)"
    assert (told in result.summary()) == (criterion != "magnitude")
    assert ("classes without scores" in result.report(tmp_path / "page.html").read_text()) == (criterion != "magnitude")


def test_the_sentences_of_a_caption_are_apart(result, tmp_path):
    page = result.report(tmp_path / "report.html").read_text(encoding="utf-8")
    captions = re.findall(r'<p class="caption">(.*?)</p>', page, re.DOTALL)
    assert captions and not [text for text in captions if re.search(r"[a-z][.][A-Z]", text)]


def test_the_page_says_what_the_units_cover(result, tmp_path):
    assert result.coverage.text.replace("'", "&#39;") in result.report(tmp_path / "page.html").read_text()
    left = {f"blocks.{i}.<b>": f"it has {i} heads" for i in range(3)}
    told = xprune.Coverage(0.5, 4, left, ("blocks.*",), 0.25)
    page = replace(result, coverage=told).report(tmp_path / "other.html").read_text()
    assert "Units cover 50.0\N{NO-BREAK SPACE}% of the MACs of this part; 3 modules were left alone" in page
    assert (
        "blocks.0.&lt;b&gt; and 2 more" in page and "all 3 modules" in page and "<b>" not in page.split("coverage")[1]
    )
    assert 'id="coverage"' not in replace(result, coverage=None).report(tmp_path / "none.html").read_text()


@pytest.mark.parametrize(("name", "there"), [("vit", True), ("registers", True), ("qk-norm", False), ("swin", False)])
def test_a_map_of_attention_is_right_or_not_there(name, there):
    model, x = build(name), images()
    site = next(site for site in xprune.find_sites(model, x) if site.kind == "head")
    found = attention(model, site, x)
    assert (found is not None) == there
    if found is not None:
        module = model.get_submodule(site.module)
        module.fused_attn = False
        seen = []
        module.attn_drop.register_forward_hook(lambda *args: seen.append(args[2]))
        model(x)
        assert torch.allclose(found, seen[0], atol=1e-5)


def test_a_saved_result_reports_the_same(result, tmp_path, monkeypatch):
    result.save(tmp_path / "pruned", arch=("vit_tiny_patch16_224", {**VIT, "num_classes": CLASSES}))
    loaded = xprune.PruneResult.load(tmp_path / "pruned")
    assert loaded.plan == result.plan and loaded.plan.info == json.loads(json.dumps(dict(result.plan.info)))
    assert loaded.metrics == result.metrics and loaded.settings == result.settings
    for part in ("values", "classwise"):
        for ours, theirs in zip(getattr(result.scores, part), getattr(loaded.scores, part), strict=True):
            # A class that was never drawn has NaN scores, and NaN is not equal to itself.
            assert torch.equal(ours.nan_to_num(-1e9), theirs.nan_to_num(-1e9))
    once = replace(result, dense=None).report(tmp_path / "a.html").read_text()
    monkeypatch.setattr(sys, "argv", ["xprune", "report", str(tmp_path / "pruned")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and (tmp_path / "pruned" / "report.html").read_text() == once


def test_scores_that_were_tampered_with_are_refused(result, tmp_path):
    arch = ("vit_tiny_patch16_224", {**VIT, "num_classes": CLASSES})
    folder = result.save(tmp_path / "pruned", arch=arch)
    data = bytearray((folder / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(data)
    with pytest.raises(xprune.ArtefactError, match="checksum"):
        xprune.PruneResult.load(folder)
    (folder / "tensors.safetensors").unlink()
    with pytest.raises(xprune.ArtefactError, match="missing"):
        xprune.PruneResult.load(folder)
    xprune.save(result.model, tmp_path / "model", arch=arch)
    with pytest.raises(xprune.ArtefactError, match="no result"):
        xprune.PruneResult.load(tmp_path / "model")


def test_what_went_where_is_said_in_words(result):
    from xprune.report import collect, findings

    sites = collect.sites(result)
    halves = [replace(site, size=4, kept=(0, 1)) for site in sites]
    facts = type("Facts", (), {"sites": sites})
    for changed, said in (
        ([replace(site, kept=tuple(range(site.size))) for site in sites], "every head was kept; every neuron was kept"),
        (halves, "every site keeps 2 of 4 heads; every site keeps 2 of 4 neurons"),
        (
            [replace(halves[0], kept=(1,)), *halves[1:-1], replace(halves[-1], kept=(0, 1, 2, 3))],
            "lost the most heads, 3 of 4",
        ),
    ):
        facts.sites = changed
        assert said in findings.network(facts)


def test_factors_of_many_classes_survive(tmp_path):
    made = synthetic(2, 2, 8, 5, rank=4)
    named = xprune.result._tensors(made.scores)
    back = xprune.result._scores(made.plan, {"criterion": "xpruner", "info": {}, "scale": "plan"}, named)
    rows, pairs = torch.arange(5), zip(made.scores.classwise, back.classwise, strict=True)
    assert all(torch.equal(ours[rows], theirs[rows]) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"classes": ["one"]}, "a name for each"),
        ({"faithfulness": {"x": {"fractions": [0], "own": [1]}}}, "others"),
        ({"faithfulness": {"x": {"fractions": [0, 1], "own": [1], "others": [1]}}}, "one length"),
    ],
)
def test_what_does_not_fit_is_refused(result, tmp_path, given, says):
    with pytest.raises(xprune.ModelError, match=says):
        result.report(tmp_path / "report.html", **given)
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(result, tmp_path, monkeypatch):
    monkeypatch.setattr(xprune.report, "find_spec", lambda name: None if name == "plotly" else True)
    with pytest.raises(xprune.ModelError, match=r"needs plotly: pip install 'xprune\[report\]'"):
        result.report(tmp_path / "report.html")


@pytest.mark.parametrize("kind", ["units", "classes", "training", "accuracy"])
def test_a_picture_for_a_paper(kind, result, tmp_path):
    from matplotlib.figure import Figure

    given = Figure().add_subplot()
    assert result.plot(kind, ax=given) is given
    ax = result.plot(kind)
    assert ax.has_data() and ax.get_xlabel()
    ax.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_a_picture_that_is_not_known_lists_those_that_are(result):
    with pytest.raises(xprune.ModelError, match="units, classes, training, accuracy"):
        result.plot("pie")
    bare = xprune.PruneResult(
        result.model, xprune.Plan(result.plan.sites, result.plan.keeps), result.scores, result.metrics
    )
    with pytest.raises(xprune.ModelError, match="history"):
        bare.plot("training")
