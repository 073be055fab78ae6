"""Activation checkpointing: the backward pass computes the activations of blocks again, instead of storing them.

The memory for activations is then that of one block, and of the inputs of all blocks. The forward of each block runs
twice. There is one way for all models, and not that of each library, because it also works in eval mode, with batch
norms, and leaves nothing behind.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xprune.errors import ModelError
from xprune.modules.blocks import blocks_of
from xprune.modules.norms import BATCH_NORMS


@contextmanager
def recomputed(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Computes the activations of the model's blocks again in the backward pass, inside a `with` block.

    The block has to contain the backward pass too. Outputs and gradients stay the same, also with dropout and batch
    norms. Models of transformers use no cache inside the block, because a cache would be filled twice. Afterwards, the
    model is as it was.

    Args:
        model: The model. Its blocks are those that `blocks_of` finds.
        wanted: If False, nothing is changed.

    Raises:
        ModelError: The model has no blocks.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
        >>> with recomputed(model):
        ...     model(torch.randn(2, 5, 8)).sum().backward()
        >>> "forward" in vars(model.layers[0])
        False
    """
    blocks = blocks_of(model) if wanted else {}
    if wanted and not blocks:
        raise ModelError(
            f"{type(model).__name__} has no blocks whose activations could be computed again: no part of it repeats. "
            "Give recompute_activations=False, and a smaller batch with accumulate= if the memory is too small."
        )
    before = [(block, vars(block).get("forward")) for block in blocks.values()]
    held = [getattr(module, "config", None) for module in model.modules()] if blocks else []
    configs: dict[int, Any] = {id(config): config for config in held}
    cached = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in cached:
            config.use_cache = False
        for block, _ in before:
            # A module reads its forward from the instance first.
            vars(block)["forward"] = _checkpointed(block)
        yield
    finally:
        for config in cached:
            config.use_cache = True
        for block, forward in before:
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    """Returns a forward for a block that stores no activations."""
    forward = block.forward
    norms = [module for module in block.modules() if isinstance(module, BATCH_NORMS)]

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        contexts = partial(_contexts, norms)
        # Arguments by name may have the names of those of `checkpoint`.
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, context_fn=contexts)

    return run


def _contexts(norms: Sequence[nn.Module]) -> tuple[Any, Any]:
    """Returns the contexts in which a block runs for the first time, and for the second time."""
    return nullcontext(), _without_statistics(norms)


@contextmanager
def _without_statistics(norms: Sequence[Any]) -> Iterator[None]:
    """Leaves the running statistics of batch norms as they are. The first run of the block has updated them already."""
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms if norm.track_running_stats]
    for norm, _, _ in before:
        # Then the batch has no weight in the running statistics. Each operation stores the same tensors as before.
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)
