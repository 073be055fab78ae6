"""Budget: which values it takes, and which numbers of units it allows."""

import pytest

import xprune


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "needs macs= or params="),
        ({"macs": 0.0}, "not in (0, 1]"),
        ({"macs": 1.5}, "not in (0, 1]"),
        ({"params": -1.0}, "not in (0, 1]"),
        ({"macs": 0.5, "min_units": -1}, "at least 0"),
        ({"macs": 0.5, "round_to": 0}, "at least 1"),
    ],
)
def test_a_value_out_of_range_is_named(given, says):
    with pytest.raises(xprune.BudgetError) as error:
        xprune.Budget(**given)
    assert says in str(error.value)


@pytest.mark.parametrize("round_to", [1, 2, 8, 12])
@pytest.mark.parametrize("width", [1, 4, 6])
def test_allowed_counts_keep_a_multiple_of_features_or_all(width, round_to):
    site = xprune.Site("a", "head", size=10, width=width, layer="a", module="a")
    counts = xprune.Budget(macs=0.5, round_to=round_to).counts(site)
    assert counts == sorted(set(counts)) and counts[-1] == 10
    assert all(count * width % round_to == 0 or count == 10 for count in counts)
