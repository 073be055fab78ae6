"""Two processes give what one gives, under the same global batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SUPPORT = Path(__file__).parents[1] / "support"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(script, processes, out):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes"]
    command += [str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    # --cpu would start one process, or need MPI: the launcher of GPUs starts gloo where it is told of none
    command += ["--multi_gpu", "--main_process_port", str(free_port())] if processes > 1 else ["--cpu"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(out)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = []
    for processes in (1, 2):
        out = tmp_path_factory.mktemp(f"processes{processes}")
        found.append((launch(SUPPORT / "distributed_run.py", processes, out), load_file(out / "tensors.safetensors")))
    return found


def test_states_of_torchmetrics_are_added_up_over_uneven_splits(tmp_path):
    """Metrics that are no mean of samples: 27 samples, 2, and 1, of which one of the processes sees none."""
    from tests.support.distributed_metrics import figures

    two, one = launch(SUPPORT / "distributed_metrics.py", 2, tmp_path), figures()
    assert two.pop("batches of one sample") == [1, 0], "a process without a batch is what is tried here"
    assert two.keys() == one.keys()
    for name, expected in one.items():
        assert two[name]["samples"] == expected.samples
        assert two[name]["metric"] == pytest.approx(expected.metric, rel=1e-6), name
        assert two[name]["loss"] == pytest.approx(expected.loss, rel=1e-5), name


def test_two_processes_were_at_work(runs):
    assert [metrics.pop("processes") for metrics, _ in runs] == [1, 2]


def test_metrics_are_those_of_one_process(runs):
    (one, _), (two, _) = runs
    for stage in ("dense", "pruned", "finetuned"):
        assert two[stage]["samples"] == one[stage]["samples"] == 27, "no sample twice, none left out"
        assert two[stage]["loss"] == pytest.approx(one[stage]["loss"], rel=1e-4)
        assert two[stage]["metric"] == pytest.approx(one[stage]["metric"], abs=1e-6)
        assert two[stage]["macs"] == one[stage]["macs"]
    assert two["keeps"] == one["keeps"]


def test_learners_end_the_same_on_every_process(runs):
    (_, _), (two, _) = runs
    first, second = two["learned"]
    assert first == second, "masks, thresholds and weights that learned along are those of one model"


def test_importance_and_weights_are_those_of_one_process(runs):
    (_, one), (_, two) = runs
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(
            "qkv.bias"
        ):  # softmax does not see a key's bias: its gradient is rounding, which Adam scales up
            two[name], one[name] = (torch.cat(t.chunk(3)[::2]) for t in (two[name], one[name]))
        torch.testing.assert_close(
            two[name], one[name], rtol=2e-3, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
