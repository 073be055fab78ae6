"""Tests that artefacts of xprune 0.1.0 still load, with the same outputs and the same information."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import xprune
from xprune.artefact.save_load import read_header
from xprune.cli.commands import main
from xprune.modules.calls import logits

FOLDER = Path(__file__).parent / "written-by-0.1.0"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def test_each_kind_is_there():
    assert NAMES == ["bert", "channels", "gone", "result"]


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_gives_its_outputs(name):
    if name == "bert":
        pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")
    inputs = load_file(FOLDER / f"{name}-check.safetensors")
    expected = inputs.pop("outputs")
    model = xprune.load(FOLDER / name)
    with torch.no_grad():
        outputs = logits(model(**inputs) if name == "bert" else model(inputs["inputs"]))
    # Another CPU uses other kernels, so the outputs differ in the last bits.
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_pruned_further_and_saved_anew(name, tmp_path):
    if name == "bert":
        pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")
    model = xprune.load(FOLDER / name)
    again = xprune.load(xprune.save(model, tmp_path / "again"))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    before, after = (read_header(path)["plan"] for path in (FOLDER / name, tmp_path / "again"))
    assert before["keeps"] == after["keeps"]


def test_the_result_tells_what_it_told(tmp_path, monkeypatch, capsys):
    result = xprune.PruneResult.load(FOLDER / "result")
    assert result.scores.criterion == "xpruner" and result.scores.classwise is not None
    assert result.metrics["pruned"].macs == 201464 and set(result.metrics) == {"dense", "pruned", "finetuned"}
    assert "blocks.1.mlp" in result.summary()
    assert result.coverage is None and "Units cover" not in result.summary()
    assert "Pruning report" in result.report(tmp_path / "page.html").read_text()
    monkeypatch.setattr(sys, "argv", ["xprune", "show", str(FOLDER / "result")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "vit_tiny_patch16_224" in shown and "finetuned" in shown


@pytest.mark.parametrize("name", NAMES)
def test_a_header_holds_no_path_of_a_machine(name):
    def strings(value):
        if isinstance(value, str):
            yield value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from strings(item)

    header = json.loads((FOLDER / name / "xprune.json").read_text())
    assert not [text for text in strings(header) if re.search(r"(^|\s)(/|~|[A-Za-z]:\\)", text)]
