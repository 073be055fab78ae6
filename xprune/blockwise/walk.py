"""Runs the forward of a model whose weights are in files, and hands each block over when its turn comes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

from xprune.blockwise.blocks import Blocks
from xprune.errors import ModelError, XPruneError
from xprune.modules.calls import call
from xprune.modules.forward import error_text
from xprune.modules.undisturbed import seeded

Handle = Callable[[int, nn.Module, dict[str, Any]], Any]
"""A function of (index of a block, the block, its keyword arguments) that returns the output of the block."""


class Turn(nn.Module):
    """Takes the place of a block in the model. When the model calls it, it hands the call over to a function.

    It holds no parameters, so Accelerate does not load the weights of the block. Other attributes are those of the
    block: some models read, for example, its type of attention.

    Args:
        block: The block.
        run: A function of the arguments and keyword arguments of the call. It returns the output.
    """

    def __init__(self, block: nn.Module, run: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        # With nn.Module.__setattr__, the block would be a child, and its parameters would be those of this module.
        object.__setattr__(self, "block_in_turn", block)
        self._run = run

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the block. Python calls this only if this module has no such attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block_in_turn"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hands the call over."""
        return self._run(args, kwargs)


@torch.no_grad()
def walk(
    model: nn.Module, stored: Mapping[str, Tensor], blocks: Blocks, inputs: Any, handle: Handle, seed: int = 0
) -> Any:
    """Calls a model, and a function in place of each block. The weights outside of the blocks are read layer by layer.

    Args:
        model: The model. Its parameters are on the meta device. After the call, it has no hooks.
        stored: The tensors by their names in the model.
        blocks: The list of blocks.
        inputs: The inputs that the model is called with.
        handle: The function that is called in place of each block. It has to return the output of the block.
        seed: The seed of random numbers in the forward.

    Returns:
        The output of the model.

    Raises:
        ModelError: The forward fails, or it does not call each block exactly once and in order.
    """
    calls = list[int]()

    def run(index: int, block: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        def turn(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(index)
            if calls != list(range(len(calls))):
                raise ModelError(
                    f"{type(model).__name__} does not call its blocks one after another, but in the order {calls}. So "
                    "they cannot be pruned one by one. Load the whole model and prune it with xprune.Pruner."
                )
            return handle(index, block, by_name(block, args, kwargs))

        return turn

    whole = model.get_submodule(blocks.path)
    assert isinstance(whole, nn.ModuleList)
    held = list(whole)
    try:
        for index, block in enumerate(held):
            whole[index] = Turn(block, run(index, block))
        with offloaded(model, stored), seeded(seed), without_cache(model):
            output = call(model, inputs)
    except XPruneError:
        raise
    except Exception as problem:
        raise ModelError(
            f"the model's forward fails on the example inputs: {error_text(problem)}. Give inputs as the model takes "
            "them: a tensor, a tuple of arguments, or a dict of keyword arguments."
        ) from problem
    finally:
        for index, block in enumerate(held):
            whole[index] = block
    if len(calls) != blocks.count:
        raise ModelError(
            f"the forward of {type(model).__name__} runs {len(calls)} of its {blocks.count} blocks on these inputs, so "
            "the others cannot be proved. Give inputs with which the model runs all its blocks."
        )
    return output


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Turns off the key-value caches of transformers inside a `with` block.

    All blocks would share one cache. A block is called several times for its proof, and each call would add to it.
    """
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value


@contextmanager
def offloaded(model: nn.Module, stored: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Makes a model read its weights from files inside a `with` block, layer by layer. Accelerate does the work.

    Args:
        model: The model. Its parameters are on the meta device.
        stored: The tensors by their names in the model.
    """
    try:
        yield cpu_offload(model, torch.device("cpu"), state_dict=stored)
    finally:
        remove_hook_from_submodules(model)


def by_name(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call as keyword arguments.

    Raises:
        ModelError: The forward of the block takes a variable number of positional arguments.
    """
    named: dict[str, Any] = {}
    for name, value in signature(block.forward).bind(*args, **kwargs).arguments.items():
        kind = signature(block.forward).parameters[name].kind
        if kind is Parameter.VAR_KEYWORD:
            named |= value
        elif kind in (Parameter.VAR_POSITIONAL, Parameter.POSITIONAL_ONLY):
            raise ModelError(
                f"the forward of {type(block).__name__} takes arguments without names, so a single block cannot be "
                "called again for its proof. Load the whole model and prune it with xprune.Pruner."
            )
        else:
            named[name] = value
    return named
