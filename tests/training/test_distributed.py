"""Tests that two processes give the same results as one, with the same global batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import distributed_run

SCRIPT = Path(distributed_run.__file__)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(processes, out, script=SCRIPT, options=("--multi_gpu",)):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes"]
    command += [str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    # --cpu would start one process, or need MPI: the launcher of GPUs starts gloo where it is told of none
    command += [*options, "--main_process_port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(out)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one():
    """(figures, tensors) of this process."""
    figures, tensors = distributed_run.pruned_and_tuned()
    return {**figures, "metrics": distributed_run.metrics()}, tensors


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(figures, tensors) of two processes, which run everything: starting them takes most of the time."""
    out = tmp_path_factory.mktemp("processes")
    launch(2, out)
    return json.loads((out / "figures.json").read_text()), load_file(out / "tensors.safetensors")


def test_states_of_torchmetrics_are_added_up_over_uneven_splits(one, two):
    """Metrics that are no mean of samples: 27 samples, 2, and 1, of which one of the processes sees none."""
    assert two[0]["batches of one"] == [1, 0], "a process without a batch is what is tried here"
    found, expected = two[0]["metrics"], one[0]["metrics"]
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert found[name]["samples"] == row["samples"]
        assert found[name]["metric"] == pytest.approx(row["metric"], rel=1e-6), name
        assert found[name]["loss"] == pytest.approx(row["loss"], rel=1e-5), name


def test_two_processes_were_at_work(one, two):
    assert [figures["processes"] for figures, _ in (one, two)] == [1, 2]


def test_metrics_are_those_of_one_process(one, two):
    (one, _), (two, _) = one, two
    for stage in ("dense", "pruned", "finetuned"):
        assert two[stage]["samples"] == one[stage]["samples"] == 27, "no sample twice, none left out"
        assert two[stage]["loss"] == pytest.approx(one[stage]["loss"], rel=1e-4)
        assert two[stage]["metric"] == pytest.approx(one[stage]["metric"], abs=1e-6)
        assert two[stage]["macs"] == one[stage]["macs"]
    assert two["keeps"] == one["keeps"]


def test_learners_end_the_same_on_every_process(two):
    first, second = two[0]["learned"]
    assert first == second, "masks, thresholds and weights that learned along are those of one model"


def test_importance_and_weights_are_those_of_one_process(one, two):
    (_, one), (_, two) = one, two
    assert one.keys() == two.keys()
    for name, expected in one.items():
        found = two[name]
        # softmax does not see a key's bias: its gradient is rounding, which Adam scales up
        if name.endswith("qkv.bias"):
            found, expected = (torch.cat(t.chunk(3)[::2]) for t in (found, expected))
        torch.testing.assert_close(
            found, expected, rtol=2e-3, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
