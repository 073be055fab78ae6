"""Tests the page of a frontier in a real browser."""

import pytest

import xprune
from tests.report.test_page import browser, opened

__all__ = ["browser"]
NAME = "blocks.0 <img src=x onerror=alert(1)> </script>"


def point(asked, metric, time, latency):
    costs = {"macs": int(1e6 * asked), "params": int(1e5 * (asked + 0.1)), "latency_ms": latency, "latency_rows": 8}
    return xprune.Point(asked, asked, (round(4 * asked), 10), xprune.Metrics(metric, 0.2, 100, **costs), time)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    dense = xprune.Metrics(0.95, 0.2, 100, macs=1_000_000, params=110_000, latency_ms=4.0, latency_rows=8)
    points = (point(0.75, 0.95, 0.8, 3.2), point(0.5, 0.945, 0.6, 2.4), point(0.25, 0.6, 0.4, 1.6))
    chance = tuple(point(share, 0.5, None, None) for share in (0.75, 0.5, 0.25))
    sites = ({"name": NAME, "kind": "head", "size": 4}, {"name": "blocks.0.mlp", "kind": "neuron", "size": 20})
    settings = {"criterion": {"name": NAME}, "least": 0.1, "budget": {"min_units": 1, "round_to": 8, "of": "model"}}
    found = xprune.Frontier("macs", dense, points, chance, sites, settings)
    return found.report(tmp_path_factory.mktemp("page") / "frontier.html")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_everything_and_asks_nobody(browser, path, width):
    page, errors, requests = opened(browser, path, width)
    assert errors == [] and requests == [path.as_uri()]
    for each in ("curve", "kept"):
        assert page.locator(f"#{each} .trace path, #{each} .heatmaplayer image").count() > 0, f"{each} is blank"
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_the_reader_chooses_a_point_and_a_cost(browser, path):
    page, errors, _ = opened(browser, path)
    # The first choice is the smallest budget that loses at most one point.
    assert page.input_value("#budget") == "1" and "50 % of the MACs keep" in page.inner_text("h1")
    assert "xprune.Budget(macs=0.5, round_to=8)" in page.inner_text("#chosen-code")
    page.select_option("#budget", "2")
    said = page.inner_text("#chosen")
    assert "accuracy 60.0 %" in said and "-35.0 points" in said and "2.50 times as fast" in said
    assert "With random scores, the accuracy is 50.0 %" in said
    assert page.locator("tr.chosen").inner_text().startswith("25 %")
    page.select_option("#cost", "latency")
    xs = page.evaluate("document.getElementById('curve').data.map(trace => [...trace.x])")
    # Chance was not timed, so its line is empty.
    assert xs[0] == pytest.approx([80, 60, 40]) and xs[1] == []
    # A click on a point chooses it.
    page.evaluate("document.getElementById('curve').scrollIntoView()")
    box = page.locator("#curve .scatterlayer .trace").first.locator(".point").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function("document.getElementById('budget').value === '0'")
    assert errors == []
    page.close()
