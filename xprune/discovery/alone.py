"""Runs one module outside of its model, with the arguments that the model calls it with."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xprune.modules.calls import map_tensors, tensors_in
from xprune.modules.copies import EVERY_MODULE_HAS, shared_copy, unshare
from xprune.modules.forward import try_forward

LARGE, SMALL = 1e4, 1e-2
"""Numbers from LARGE on are not changed by `with_noise_on`. Noise on numbers below SMALL is larger than they are."""


@dataclass
class FirstCall:
    """The arguments of a module's first call in a forward pass.

    Attributes:
        args: The positional arguments.
        kwargs: The keyword arguments.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> first_calls(nn.Sequential(layer), torch.zeros(4, 2), ["0"])["0"].kwargs
        {}
    """

    args: Any
    kwargs: Any


class Alone(nn.Module):
    """A model that contains one module of a larger model, and calls it as the larger model does.

    Surgery and the proof need a whole model. With this class, they can work on one module. The path of the module is
    "module".

    Args:
        module: The module.
        features: The number of features of the output that counts. It is needed if the module returns several tensors.
            None means that the first tensor counts.

    Example:
        >>> alone = Alone(nn.Linear(2, 3))
        >>> alone(args=(torch.zeros(4, 2),), kwargs={}).shape
        torch.Size([4, 3])
    """

    def __init__(self, module: nn.Module, features: int | None = None) -> None:
        super().__init__()
        self.module, self.features = module, features

    def forward(self, args: Any, kwargs: Any) -> Tensor:
        """Calls the module, and returns one tensor of its output.

        Args:
            args: The positional arguments of the call. They are copied, since the module may change them.
            kwargs: The keyword arguments of the call. They are copied too.
        """
        args, kwargs = copied((args, kwargs))
        returned = tensors_in(self.module(*args, **kwargs))
        # Other outputs of an attention may be its weights, which have an axis of heads.
        wanted = [t for t in returned if self.features in t.shape[1:]]
        return (wanted or returned)[0]


def copied(given: Any) -> Any:
    """Returns a copy of a module's arguments, since a module may change them.

    An example is a key-value cache, which grows at every call.
    """
    if isinstance(given, Tensor):
        return given.detach().clone() if not given.requires_grad else given.clone()
    # Named tuples and other subclasses are left to deepcopy, since their constructors may take other arguments.
    if isinstance(given, (tuple, list)) and type(given) in (tuple, list):
        return type(given)(copied(item) for item in given)
    if type(given) is dict:
        return {name: copied(item) for name, item in given.items()}
    # A module is not copied: it may be large, and our calls do not change it.
    if given is None or isinstance(given, (nn.Module, str, int, float, bool)):
        return given
    try:
        return copy.deepcopy(given)
    # Some objects cannot be copied, such as locks. The module then gets the object itself.
    except Exception:
        return given


@torch.no_grad()
def first_calls(model: nn.Module, example_inputs: Any, paths: Iterable[str]) -> dict[str, FirstCall]:
    """Runs a copy of the model, and records the first call of each module.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        paths: The paths of the modules. "" is the path of the model itself.

    Returns:
        Path of a module -> its first call. Modules that the forward does not call are left out.

    Raises:
        ModelError: The forward of the model fails.
    """
    twin, calls = shared_copy(model), dict[str, FirstCall]()

    def enter(path: str) -> Any:
        """Returns a hook that records the arguments of the module's first call."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in calls:
                calls[path] = FirstCall(*copied((args, kwargs)))

        return hook

    for path in dict.fromkeys(paths):
        twin.get_submodule(path).register_forward_pre_hook(enter(path), with_kwargs=True)
    try_forward(twin, example_inputs)
    return calls


@torch.no_grad()
def with_noise_on(inputs: Any) -> Any:
    """Returns the arguments of a call with noise on their floating-point numbers.

    Some arguments hide mistakes. For example, all queries of the first decoder layer of a detection model are zero, so
    its attention does nothing. A few very large numbers stay, since they are those of a mask. If most numbers are far
    from 0, all are made smaller, because a softmax of such numbers ignores most of its inputs.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        size = float(tensor[tensor.isfinite()].abs().median()) if bool(tensor.isfinite().any()) else 0.0
        if size > 10:
            tensor = tensor / size
        usual = tensor.abs() < LARGE
        spread = float(tensor[usual].std()) if int(usual.sum()) > 1 else 0.0
        added = torch.randn(tensor.shape, generator=generator).to(tensor) * (0.3 * spread if spread > SMALL else 1.0)
        return torch.where(usual, tensor + added, tensor)

    return map_tensors(inputs, noise)


@torch.no_grad()
def noisy(module: nn.Module, features: int | None = None) -> Alone:
    """Returns a module as a model of its own, with noise on all weights, so that each unit changes the output.

    Some weights are zero at the start of training, for example those of a last projection. They would hide a wrong cut.

    Args:
        module: The module. It is not changed.
        features: See `Alone`.
    """
    # The weights get noise, so the copy must not share them with the caller's model.
    alone: Any = unshare(shared_copy(Alone(module, features)), module)
    generator = torch.Generator().manual_seed(0)
    for parameter in alone.parameters():
        if parameter.is_floating_point():
            # With noise of this size on a weight matrix, the outputs of the layer are about as large as its inputs.
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * scale)
    _share_settings(alone)
    found: Alone = alone
    return found


def holds_settings(value: Any) -> bool:
    """Returns True for an object that holds settings, such as the config of a model, else False."""
    plain = (Tensor, nn.Module, type, str, bytes, int, float, tuple, list, Mapping, set, torch.dtype)
    return not isinstance(value, plain) and not callable(value) and hasattr(value, "__dict__") and bool(vars(value))


def _share_settings(alone: nn.Module) -> None:
    """Makes all later copies of a model share the objects with its settings, in place.

    The search copies a module many times, and the config of a large model holds thousands of values. Nobody writes into
    these objects: surgery replaces them, see `set_attribute`.
    """
    shared = dict[int, Any]()
    for module in alone.modules():
        for name, value in list(vars(module).items()):
            if name in EVERY_MODULE_HAS or not holds_settings(value):
                continue
            if id(value) not in shared:
                shared[id(value)] = twin = copy.copy(value)
                kind: Any = type(value)
                # Some classes do not allow a subclass. Their objects are copied each time.
                with suppress(Exception):
                    twin.__class__ = type(kind.__name__, (kind,), {"__deepcopy__": lambda self, memo: self})
            vars(module)[name] = shared[id(value)]
