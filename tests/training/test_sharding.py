"""Tests that two processes that share the weights of a model by FSDP2 give what processes with whole weights give."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import sharded_run
from tests.training.test_distributed import launch

FSDP = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
WRAPPED = ("--fsdp_transformer_layer_cls_to_wrap", "Block")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(tensors, texts) of two processes."""
    out = tmp_path_factory.mktemp("sharded")
    launch(2, out, Path(sharded_run.__file__), (*FSDP, *WRAPPED))
    content = (out / "tensors.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return load_file(out / "tensors.safetensors"), header


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def assert_near(found, expected):
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        # softmax does not see a key's bias: its gradient is rounding, which Adam scales up
        if name.endswith("qkv.bias"):
            tensor, found[name] = (torch.cat(t.chunk(3)[::2]) for t in (tensor, found[name]))
        torch.testing.assert_close(
            found[name], tensor, rtol=2e-3, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_weights_were_sharded_and_all_processes_have_the_same_results(two):
    tensors, texts = two
    assert tensors["sharding"].all(), "FSDP2, in two processes"
    assert texts["differing"] == ""


@pytest.mark.parametrize("name", sharded_run.RANDOM)
def test_results_are_those_of_two_processes_with_whole_weights(two, name):
    assert_near(part(two[0], f"sharded/{name}/"), part(two[0], f"whole/{name}/"))


@pytest.mark.parametrize("name", [name for name in sharded_run.PARTS if name not in sharded_run.RANDOM])
def test_results_are_those_of_one_process(two, name):
    assert_near(part(two[0], f"sharded/{name}/"), sharded_run.PARTS[name]())


REFUSED = {
    "captum": "TrainingError: captum:IntegratedGradients needs the whole weights",
    "fine-tuning": "TrainingError: Fine-tuning needs the whole weights",
    "joint": "TrainingError: learned,weights=joint needs the whole weights",
    "too few samples": "DataError: only 1 of 2 processes have a batch",
    "weights": "ModelError: reader: its gate multiplies the weight",
    "version 1": "TrainingError: xprune does not work with version 1 of FSDP",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_whole_weights_is_refused_by_name(two, name):
    text = two[1][f"error {name}"]
    assert text.startswith(REFUSED[name]), text
