"""FSDP2: each process holds a part of each weight, and gets the whole weights of a block only while it computes it.

`accelerate launch` with an FSDP configuration turns it on. Sites are found, and units are cut, in whole models: xprune
shards a copy for scoring only.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn

from xprune.core.site import Site
from xprune.errors import DataError, ModelError, TrainingError
from xprune.modules.paths import layer_path
from xprune.training.runtime import reduced


def shard(runner: Accelerator, model: nn.Module, sites: Sequence[Site] = ()) -> nn.Module:
    """Shards a model whose weights are not trained, for scoring. Without FSDP2, nothing is done.

    Args:
        runner: The Accelerator.
        model: The model, which no other code may need as a whole. It is changed: its parameters become DTensors.
        sites: The sites whose units will be gated.

    Returns:
        `model`, on the device of the Accelerator.

    Raises:
        ModelError: A gate multiplies a weight. With FSDP2, a weight exists as a whole only while its block is computed.
    """
    if not runner.is_fsdp2:
        return model
    for site in sites:
        for path in site.consumers:
            if layer_path(model, path) != path:
                raise ModelError(
                    f"{site.name}: its gate multiplies the weight {path}, which FSDP shards. Leave the site out: "
                    "find_sites(..., exclude=[...]). Or score without FSDP, for example with the criterion magnitude."
                )
    sharded: nn.Module = fsdp2_prepare_model(runner, model)
    for name, buffer in sharded.named_buffers():
        if buffer.device != runner.device:
            owner, _, own = name.rpartition(".")
            setattr(sharded.get_submodule(owner), own, buffer.to(runner.device))
    return sharded


def refuse_sharding(runner: Accelerator, who: str, do: str) -> None:
    """Raises TrainingError if FSDP2 is on. Code calls it that needs whole weights.

    Args:
        runner: The Accelerator.
        who: What cannot work with FSDP2, for the error.
        do: What the user can do instead.
    """
    if runner.is_fsdp2:
        raise TrainingError(f"{who} needs the whole weights of the model, which FSDP shards. {do}")


def average_gradients(runner: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Takes the mean of gradients over all processes, for parameters that FSDP2 does not shard.

    Without FSDP2, nothing is done, because DistributedDataParallel takes the mean.

    Args:
        runner: The Accelerator.
        parameters: The parameters. On all processes, the same ones have a gradient.
    """
    if runner.is_fsdp2:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = reduced(runner, parameter.grad) / runner.num_processes


def in_step(runner: Accelerator, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yields the batches of a process, and keeps all processes in step: sharded weights are gathered together.

    A process whose batches have ended repeats its last one until those of all processes have ended.

    Args:
        runner: The Accelerator.
        batches: The batches of this process.

    Yields:
        (batch, True). For a repeated batch, (batch, False): its results must not be used.

    Raises:
        DataError: A process has no batch at all.
    """
    last, iterator, first = None, iter(batches), True
    nothing = object()
    while True:
        batch = next(iterator, nothing)
        mine = batch is not nothing
        if not runner.is_fsdp2:
            if not mine:
                return
            yield batch, True
            continue
        having = int(reduced(runner, torch.tensor([float(mine)], device=runner.device)))
        if first and having < runner.num_processes:
            raise DataError(
                f"only {having} of {runner.num_processes} processes have a batch. With FSDP, each process needs one: "
                "give more samples, or use fewer processes."
            )
        if not having:
            return
        last, first = batch if mine else last, False
        yield last, mine
