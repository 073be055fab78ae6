"""Tests the keywords of `Units`, and that the old keywords still work."""

import warnings
from dataclasses import fields

import pytest
from torch import nn

from xprune import Adapter
from xprune.adapters import Also, Features, Forwards, Scope, Stream, Units
from xprune.adapters.old_keywords import OLD, PARTS

CORE = ("mine", ("my.Attention",), (("qkv", 3),))
CASES = {
    "tensors": ((("table", 1),), {"also": Also(tensors=(("table", 1),))}),
    "layers": (("gate",), {"also": Also(layers=("gate",))}),
    "norm": ("norm", {"also": Also(norm="norm")}),
    "counts": (("dim",), {"also": Also(attributes=("dim",))}),
    "caches": (("cache",), {"also": Also(caches=("cache",))}),
    "layout": ("width-major", {"features": Features(layout="width-major")}),
    "transposed": (True, {"features": Features(transposed=True)}),
    "width": ("head_dim", {"features": Features(width="head_dim")}),
    "pruned": (nn.Linear, {"forwards": Forwards(pruned=nn.Linear)}),
    "gated": (nn.Linear, {"forwards": Forwards(gated=nn.Linear)}),
    "removed": (nn.Linear, {"forwards": Forwards(removed=nn.Linear)}),
    "index": ("built", {"forwards": Forwards(built="built")}),
    "stream": ((("sr.weight", 1),), {"stream": Stream(tensors=(("sr.weight", 1),))}),
    "after": (("bn",), {"stream": Stream(after=("bn",))}),
    "along": (("dim",), {"stream": Stream(attributes=("dim",))}),
    "joins": (True, {"stream": Stream(joins=True)}),
    "needs": (("gate",), {"scope": Scope(needs=("gate",))}),
    "unless": ("shared", {"scope": Scope(unless="shared")}),
    "inner": ("attention", {"scope": Scope(inner="attention")}),
    "whole": (False, {"scope": Scope(whole=False)}),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_keyword_is_a_part_and_warns(name):
    value, parts = CASES[name]
    with pytest.warns(DeprecationWarning, match=rf"instead of Units\({name}=\)") as caught:
        old = Units(*CORE, **{name: value})
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert old == Units(*CORE, **parts)


def test_every_field_of_a_part_had_an_old_keyword():
    assert {(part, each.name) for part, kind in PARTS.items() for each in fields(kind)} == set(OLD.values())


def test_a_module_that_runs_without_units_is_removed_by_its_pruned_class():
    with pytest.warns(DeprecationWarning, match="empties"):
        old = Units(*CORE, pruned=nn.Linear, empties=True)
    new = Units(*CORE, forwards=Forwards(pruned=nn.Linear, removed=nn.Linear))
    assert old == new and new.empties and not Units(*CORE).empties


def test_old_and_new_keywords_of_one_part_are_joined():
    with pytest.warns(DeprecationWarning):
        mixed = Units(*CORE, also=Also(norm="norm"), counts=("dim",), caches=("a",))
    assert mixed == Units(*CORE, also=Also(norm="norm", attributes=("dim",), caches=("a",)))


def test_what_surgery_asks_of_an_adapter_is_in_the_parts():
    made = Units(*CORE, forwards=Forwards(nn.Linear, nn.Conv2d, nn.Identity), stream=Stream(joins=True))
    assert (made.pruned, made.gated, made.removed, made.joins) == (nn.Linear, nn.Conv2d, nn.Identity, True)


def test_renamed_keywords_work_and_warn():
    with pytest.warns(DeprecationWarning, match=r"readers= is now producers=, writer= is now consumer=") as caught:
        old = Units("mine", ("my.Attention",), readers=(("qkv", 3),), writer="out")
    assert caught[0].filename == __file__
    assert old == Units(*CORE, consumer="out")


def test_the_old_name_of_stream_parts_works_and_warns():
    with pytest.warns(DeprecationWarning, match=r"Mine\.along_stream is now called stream_parts") as caught:

        class Mine(Adapter):
            name, classes = "mine", ()

            def site(self, path, module):
                return None

            def along_stream(self, path, module):
                return path

    assert caught[0].filename == __file__
    assert Mine().stream_parts("block", nn.Identity()) == "block"


def test_a_keyword_that_never_was_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword"):
        Units(*CORE, nothing=1)
