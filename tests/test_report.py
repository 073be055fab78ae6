"""The report: in a real browser, from a real run, at full size, and closed to what names may hold."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import xprune
from benchmarks.report_page import synthetic
from tests.models import CLASSES, VIT, build, images, loader
from xprune.cli import main
from xprune.report.attention import attention

pytest.importorskip("jinja2")
pytest.importorskip("plotly")
NAMES = [f"animal {i} <img src=x onerror=alert(1)> </script>" for i in range(CLASSES)]
DRAWN = "id => document.getElementById(id).calcdata"
"""What plotly made of a chart's traces."""
FAITHFUL = {"xpruner, deletion": {"fractions": [0, 0.5, 1], "own": [0.9, 0.4, 0.1], "others": [0.9, 0.7, 0.1]}}


@pytest.fixture(scope="module")
def result():
    criterion = xprune.CRITERIA["xpruner"](steps=6)
    selection = xprune.LearnedThresholds(steps=6)
    budget = xprune.Budget(macs=0.6)
    pruner = xprune.Pruner(build("vit"), criterion, budget, selection, xprune.Finetune(epochs=4))
    return pruner.run(loader(32), loader(32))


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium is installed: a report can only be tested in a real browser")
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser, path, width=1280):
    """(the page, ready; its console errors; its requests)."""
    page, errors, requests = browser.new_page(viewport={"width": width, "height": 900}), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: (errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]", timeout=20_000)
    return page, errors, [url for url in requests if not url.startswith(("data:", "blob:"))]


@pytest.fixture(scope="module")
def path(result, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    return result.report(out, classes=NAMES, faithfulness=FAITHFUL)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_draws_everything_and_asks_nobody(browser, path, width):
    page, errors, requests = opened(browser, path, width)
    assert errors == [] and requests == [path.as_uri()]
    ids = page.eval_on_selector_all(".chart", "all => all.map(each => each.id)")
    assert set(ids) == {
        *("why-scores", "why-classes", "map-head", "map-neuron", "accuracy", "training", "faithfulness")
    }
    for each in ids:
        assert page.evaluate(f"id => ({DRAWN})(id).some(t => t[0].z ? t[0].z.length : t.length > 1)", each), each
        marks = page.locator(f"#{each} .trace path, #{each} .heatmaplayer image, #{each} .trace text")
        assert marks.count() > 0, f"{each} is blank"
    sizes = page.eval_on_selector_all("img", "all => all.map(each => each.naturalWidth)")
    assert len(sizes) == 4 * 5 and min(sizes) > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = "width => [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > width + 1)"
    assert page.evaluate(wide + ".filter(e => !e.closest('svg')).map(e => e.className)", width) == []
    page.close()


@pytest.fixture(scope="module")
def page(browser, path):
    return opened(browser, path)[0]


def test_names_from_outside_are_text(page):
    assert page.locator("img[src=x]").count() == 0
    assert "animal 0 <img src=x onerror=alert(1)> </script>" in page.inner_text("main")


def test_choosing_a_head_says_why_it_went_or_stayed(page, result):
    site, keep = result.plan.sites[0], set(result.plan.keeps[0])
    said = []
    for unit in range(site.size):
        button = page.locator("button[data-head]").nth(unit)
        button.click()
        said.append(page.inner_text("#why"))
        word = "stayed" if unit in keep else "went"
        assert f"Why head {unit} of {site.name} {word}: it ranks" in said[-1]
        assert button.get_attribute("aria-pressed") == "true"
    assert len(set(said)) == site.size
    page.select_option("#head", "0")
    scores = result.scores.values[0]
    rank = int((scores > scores[0]).sum()) + 1
    assert f"It ranks {rank} of {site.size} in its site, where {len(keep)} stayed" in page.inner_text("#why-text")
    assert "animal" in page.inner_text("#why-text") and "learned threshold" in page.inner_text("#why-text")


def test_pointing_at_the_map_reads_it_out(page):
    place, line = page.locator("#map-head .nsewdrag").first, page.locator("#map-head-readout")
    place.scroll_into_view_if_needed()
    before, box = line.inner_text(), place.bounding_box()
    page.mouse.move(box["x"] + 4, box["y"] + 4)
    page.mouse.move(box["x"] + 6, box["y"] + 6)
    page.wait_for_function("text => document.getElementById('map-head-readout').textContent !== text", arg=before)
    assert re.fullmatch(r"animal 0 .*, blocks\.0\.attn, head 0: (kept|removed), percentile \d+", line.inner_text())


def test_a_thousand_classes_fit(browser, tmp_path):
    path = synthetic(rank=4).report(tmp_path / "large.html")
    assert path.stat().st_size < 15e6
    page, errors, _ = opened(browser, path, 390)
    assert errors == []
    assert page.locator("button[data-head]").count() == 144
    shape = f"id => {{ const {{ z }} = ({DRAWN})(id)[0][0]; return z.length + 'x' + z[0].length }}"
    assert page.evaluate(shape, "map-head") == "1000x144"
    assert page.evaluate(shape, "map-neuron") == "1000x288"
    assert page.evaluate("document.getElementById('losses').data[0].x.length") == 1000
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_what_is_not_there_is_left_out_or_says_why(browser, tmp_path):
    model = build("vit")
    found = xprune.Pruner(model, "magnitude", xprune.Budget(macs=0.6), finetune=None).run(loader())
    bare = replace(found, dense=None, metrics={k: replace(m, by_class=()) for k, m in found.metrics.items()})
    page, errors, _ = opened(browser, bare.report(tmp_path / "report.html"))
    text = page.inner_text("main")
    assert errors == []
    for reason in ("all classes at once", "No accuracy by class", "No pictures of inputs", "on training data"):
        assert reason in text
    assert page.eval_on_selector_all(".chart", "all => all.map(each => each.id)") == ["why-scores"]
    page.close()


def test_percentiles_of_a_class_are_ranks(result):
    from xprune.report.classmap import head_map, percentiles

    table = torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 0.0], [torch.nan] * 3])
    assert percentiles(table).nan_to_num(-1).tolist() == [[100, 0, 50], [75, 75, 0], [-1, -1, -1]]
    found = head_map(result)
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
            assert torch.equal(ours.nan_to_num(-1e9), theirs.nan_to_num(-1e9))  # NaN for a class that was never drawn
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
        ([replace(site, kept=tuple(range(site.size))) for site in sites], "every head stays; every neuron stays"),
        (halves, "every site keeps 2 of 4 heads; every site keeps 2 of 4 neurons"),
        (
            [replace(halves[0], kept=(1,)), *halves[1:-1], replace(halves[-1], kept=(0, 1, 2, 3))],
            "lost most heads, 3 of 4",
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
