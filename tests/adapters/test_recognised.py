"""Tests of models of transformers that no adapter knows: recognised, exact, saved without `arch`, and generating."""

import pytest

from benchmarks.model_rows import measure
from benchmarks.transformers_models import build

pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")

TYPES = {
    # Name of the type -> the numbers of attentions and MLPs that are found, and what is special about it.
    "xlm-roberta": (2, 2),  # the output projection lies in a sibling module
    "phi3": (2, 2),  # one fused layer with unequal parts, the number of heads only in the config
    "mixtral": (2, 2),  # no number of heads, experts as parameters with three axes
    "bloom": (2, 2),  # the model hands a bias for each head to all layers
    "t5": (6, 4),  # the first layer hands its position bias to the others
    "minicpm3": (2, 2),  # latent attention
    "fsmt": (6, 4),  # the forward uses the width of its input
    "cvt": (5, 6),  # convolutions make queries, keys and values
}


@pytest.mark.parametrize("name", TYPES)
def test_a_type_without_an_adapter_is_pruned_exactly(name):
    row = {"type": name}
    measure(row, lambda: build(name)[:2], lambda _: None)
    attentions, mlps = TYPES[name]
    assert row["attentions"] == {"expected": attentions, "found": attentions, "exact": attentions}, row["missing"]
    assert row["mlps"] == {"expected": mlps, "found": mlps, "exact": mlps}, row["missing"]
    assert {plan["result"] for plan in row["plans"].values()} == {"exact"} and not row["foreign"]
    assert row["saved"] == "exact" and row["generated"] in ("equal", "")
