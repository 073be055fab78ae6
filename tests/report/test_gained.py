"""Tests that the summary, the command line and the report say what pruning gained, and what to do if it is little."""

import sys
from dataclasses import replace

import pytest

import xprune
from tests.support.models import CLASSES, VIT
from xprune.cli.commands import main
from xprune.core.target import Target
from xprune.core.times import Ratio
from xprune.report.gained import gain_note
from xprune.report.text import metrics_table, render

GPU, CPU = Target("cuda", "bfloat16"), Target("cpu", "float32")
DENSE = xprune.Metrics(0.9, 0.3, 100, macs=1_260_000_000, params=22_100_000, latency_ms=24.9, latency_rows=512)


def metrics(speedup, target=GPU, rows=512, share=0.5):
    pruned = replace(DENSE, macs=int(share * DENSE.macs), params=12_100_000, latency_ms=24.9 / speedup)
    timed = {"speedup": Ratio(speedup, speedup - 0.08, speedup + 0.08), "dense_ms": 24.9, "target": target}
    return {"dense": replace(DENSE, latency_rows=rows), "pruned": replace(pruned, latency_rows=rows, **timed)}


def test_a_good_gain_needs_no_words():
    assert gain_note(metrics(1.2)) == "" and metrics(1.2)["pruned"].gain(DENSE) == pytest.approx(0.6)
    assert gain_note({"dense": DENSE}) == gain_note({"dense": DENSE, "pruned": replace(DENSE, macs=1)}) == ""


@pytest.mark.parametrize(
    ("speedup", "share", "says"),
    [
        (0.75, 0.5, "is slower than the dense model: 0.75x (0.67 to 0.83), with 50 % of the MACs (gain 0.38)"),
        (1.12, 0.5, "gains little time: it is 1.12x (1.04 to 1.20) as fast as the dense model, with 50 %"),
        (0.95, 0.9, "is slower than the dense model: 0.95x"),
    ],
)
def test_a_small_gain_is_said(speedup, share, says):
    assert says in gain_note(metrics(speedup, share=share))


def test_a_slower_model_is_slower_where_nobody_counted_macs():
    found = {name: replace(row, macs=None) for name, row in metrics(0.75).items()}
    assert "slower than the dense model: 0.75x (0.67 to 0.83). What can help" in gain_note(found)


ROUNDING, TIME, BATCH, COMPILE = 'round_to="auto"', "latency=0.5", "a larger batch", "torch.compile"
COMPILED = Target("cuda", "bfloat16", compiled=True)


@pytest.mark.parametrize(
    ("target", "rows", "budget", "advice"),
    [
        (GPU, 64, {"macs": 0.5, "round_to": 1}, {ROUNDING, TIME, BATCH, COMPILE}),
        (GPU, 64, {"macs": 0.5, "round_to": 8}, {ROUNDING, TIME, BATCH, COMPILE}),
        (GPU, 512, {"macs": 0.5, "round_to": 64}, {TIME, COMPILE}),
        (GPU, 512, {"macs": 0.5, "round_to": "auto"}, {TIME, COMPILE}),
        (GPU, 512, {"round_to": [["head", 64], ["neuron", 8]]}, {ROUNDING, TIME, COMPILE}),
        (GPU, 512, {"round_to": [["head", 64], ["neuron", 64]], "latency": 0.5}, {COMPILE}),
        (GPU, 512, {"resources": [["latency", 0.5]], "round_to": 64}, {COMPILE}),
        (GPU, 512, {"latency_ms": 7.5, "latency": None, "round_to": 64}, {COMPILE}),
        # On the CPU, float32 products of any size are fast.
        (CPU, 64, {"macs": 0.5, "round_to": 1}, {TIME, COMPILE}),
        (CPU, 1, {"macs": 0.5, "round_to": 1}, {TIME, COMPILE, BATCH}),
        (Target("cpu", "bfloat16"), 64, {"macs": 0.5}, {ROUNDING, TIME, COMPILE}),
        (COMPILED, 512, {"macs": 0.5, "round_to": 64}, {TIME}),
        (COMPILED, 512, {"latency": 0.5, "round_to": 64}, set()),
        # A result may not say where it was measured, or how it was made.
        (None, None, None, {ROUNDING, TIME, BATCH, COMPILE}),
    ],
)
def test_only_what_applies_is_advised(target, rows, budget, advice):
    note = gain_note(metrics(0.9, target, rows), {"budget": budget})
    assert {each for each in (ROUNDING, TIME, BATCH, COMPILE) if each in note} == advice
    assert note.endswith(".") and "What can help: " in note and "\n" not in note


def test_the_table_is_readable_at_110_columns():
    lines = render(metrics_table(metrics(1.58))).splitlines()
    dense, pruned = (next(line for line in lines if f"│ {name} " in line) for name in ("dense", "pruned"))
    assert "24.9 ms" in dense and "│    - │" in dense
    assert "15.8 ms, 1.58x (1.50 to 1.66) │ 0.79 │" in pruned and len(pruned) <= 110


def test_without_a_speed_up_there_is_no_column_for_the_gain():
    assert "gain" not in render(metrics_table({"dense": DENSE}))


@pytest.fixture(scope="module")
def slow(result):
    """A result whose pruned model is slower than the dense one."""
    timed = {"speedup": Ratio(0.85, 0.8, 0.9), "dense_ms": 2.0, "latency_ms": 2.35, "target": GPU}
    rows = {name: row if name == "dense" else replace(row, **timed) for name, row in result.metrics.items()}
    return replace(result, metrics=rows)


def test_summary_page_and_command_say_it(slow, tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2")
    pytest.importorskip("plotly")
    says = "The pruned model is slower than the dense model: 0.85x (0.80 to 0.90)"
    assert says in slow.summary()
    page = slow.report(tmp_path / "page.html").read_text()
    assert says in page and "samples: 0.85x (0.80 to 0.90) as fast" in page and "<th>gain</th>" in page
    saved = slow.save(tmp_path / "saved", arch=("vit_tiny_patch16_224", {**VIT, "num_classes": CLASSES}))
    again = xprune.PruneResult.load(saved)
    assert again.metrics == slow.metrics and says in again.summary()
    monkeypatch.setattr(sys, "argv", ["xprune", "show", str(saved)])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr().out
    assert not stop.value.code and says in shown and "torch.compile" in shown
