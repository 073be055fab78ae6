"""Tests the page of a report in a real browser, also at full size and with dangerous names."""

import re
import shutil
from dataclasses import replace

import pytest

import xprune
from benchmarks.report_page import synthetic
from tests.support.models import CLASSES, build, loader

pytest.importorskip("jinja2")
pytest.importorskip("plotly")
NAMES = [f"animal {i} <img src=x onerror=alert(1)> </script>" for i in range(CLASSES)]
DRAWN = "id => document.getElementById(id).calcdata"
"""What plotly made of a chart's traces."""
FAITHFUL = {"xpruner, deletion": {"fractions": [0, 0.5, 1], "own": [0.9, 0.4, 0.1], "others": [0.9, 0.7, 0.1]}}


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
    """Returns the page when it is ready, its console errors and its requests."""
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
        button = page.locator("button[data-unit]").nth(unit)
        button.click()
        said.append(page.inner_text("#why"))
        word = "stayed" if unit in keep else "was removed"
        assert f"Why head {unit} of {site.name} {word}: it ranks" in said[-1]
        assert button.get_attribute("aria-pressed") == "true"
    assert len(set(said)) == site.size
    page.select_option("#unit", "0")
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
    # The page has as many columns for 256 neurons of a site as for 3,072: most of them stand in bins.
    path = synthetic(neurons=256, rank=4).report(tmp_path / "large.html")
    assert path.stat().st_size < 15e6
    page, errors, _ = opened(browser, path, 390)
    assert errors == []
    assert page.locator("button[data-unit]").count() == 144
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
