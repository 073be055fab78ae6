"""Tests that names and settings are turned into plug-ins, and the messages for unknown ones."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

import xprune
from xprune.core.registry import named, registered, resolve

GROUPS = ("adapters", "criteria", "selections", "unit_kinds", "resources")


@dataclass(frozen=True)
class Cooked(xprune.Criterion):
    """A criterion with settings of several types."""

    steps: int = 3
    slope: tuple[float, float] = (1.0, 2.0)
    mode: str = "fast"
    limit: float | None = 0.5
    name: ClassVar[str] = "cooked"

    def score(self, context, sites):
        raise NotImplementedError


KINDS = {"cooked": Cooked}


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("cooked", Cooked()),
        ("cooked,steps=5", Cooked(steps=5)),
        ("cooked,slope=[5,20],mode=slow", Cooked(slope=(5, 20), mode="slow")),
        ("cooked,limit=null", Cooked(limit=None)),
        ("cooked,limit=None", Cooked(limit=None)),
        (Cooked(steps=9), Cooked(steps=9)),
    ],
)
def test_a_name_with_settings_is_an_instance(text, made):
    assert resolve(text, KINDS, xprune.Criterion, "criterion") == made


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raw", "unknown criterion 'raw'; known: cooked, or an instance of xprune.Criterion"),
        (3, "unknown criterion 3"),
        ("cooked,speed=3", "cooked has no setting 'speed'; it has steps, slope, mode, limit"),
        ("cooked,steps", "wanted key=value"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(text, says):
    with pytest.raises(xprune.PluginError, match=says):
        resolve(text, KINDS, xprune.Criterion, "criterion")


@pytest.mark.parametrize("group", GROUPS)
def test_every_table_is_the_public_mapping_of_its_group(group):
    table = getattr(xprune, group.upper())
    assert registered(group) is table and len(table) >= 2
    assert all(plugin.name == name for name, plugin in table.items())
    with pytest.raises(xprune.PlanError, match=f"unknown thing 'x'; known: {next(iter(table))}, "):
        named(group, "x", "thing", xprune.PlanError)


@pytest.mark.parametrize("group", GROUPS)
def test_a_script_adds_its_own(group, monkeypatch):
    plugin = object()
    monkeypatch.setitem(getattr(xprune, group.upper()), "mine", plugin)
    assert named(group, "mine", "thing", xprune.PlanError) is plugin
