"""Tests that the private state of Accelerate exists, and can be set aside and put back."""

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from xprune.training import accelerate_state
from xprune.training.runtime import accelerator, is_main_process, stage

KINDS = (AcceleratorState, GradientState, PartialState)
READ = (
    f"accelerate has changed since {accelerate_state.READ_FROM}: read its state.py again, "
    "and mend xprune/training/accelerate_state.py"
)


@pytest.fixture(autouse=True)
def fresh():
    """Gives a new state of Accelerate."""
    with accelerate_state.kept():
        for kind in KINDS:
            kind._shared_state.clear()
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_instances_share_one_dictionary(kind):
    Accelerator()
    assert isinstance(kind._shared_state, dict), READ
    assert kind().__dict__ is kind._shared_state, READ


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_callers_is_put_back(precision, error):
    theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    before = {kind: dict(kind._shared_state) for kind in KINDS}
    try:
        with stage():
            ours = accelerator(precision)
            assert ours.mixed_precision == precision and ours.gradient_accumulation_steps == 1, READ
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert theirs.mixed_precision == "bf16" and theirs.gradient_accumulation_steps == 4, READ
    assert {kind: dict(kind._shared_state) for kind in KINDS} == before
    assert theirs.autocast_handler is None or theirs.autocast_handler.enabled


def test_a_loader_that_the_caller_is_reading_stays_noted():
    theirs = Accelerator()
    state = GradientState()
    # Accelerate notes a loader that is being read like this.
    state._dataloader_references_ref.append(lambda: "a loader")
    noted = list(state._dataloader_references_ref)
    with stage():
        state._dataloader_references_ref.clear()
        accelerator("bf16")
    assert theirs.gradient_state._dataloader_references_ref == noted, READ


def test_where_there_was_none_there_is_none():
    with stage():
        accelerator("bf16")
    assert is_main_process()
    assert not any(kind._shared_state for kind in KINDS), READ
