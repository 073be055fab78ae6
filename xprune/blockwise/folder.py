"""Opens a folder of weights without reading them: the model has shapes and no values, the tensors are read one by one.

Parameters are on the meta device. Buffers have their values, since most of them are computed and not stored.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn

from xprune.artefact.libraries.transformers import TRANSFORMERS
from xprune.artefact.libraries.transformers_private import names_in_model
from xprune.artefact.shards import Stored
from xprune.core.provenance import Arch
from xprune.errors import ArtefactError, ModelError
from xprune.modules.copies import tensors
from xprune.modules.forward import error_text

CONFIG = "config.json"
"""The file in which transformers writes the config of a model."""

SHOWN = 3
"""The largest number of names in a message."""


@dataclass(frozen=True)
class Opened:
    """A model whose weights lie in a folder.

    Attributes:
        model: The model in eval mode. Its parameters are on the meta device, in the dtypes of the files. Its buffers
            have their values.
        stored: The tensors of the files, by the names that they have in the model.
        ties: Further name of a tied tensor -> its first name.
        arch: The architecture of the model. None if it is not a model of transformers.
    """

    model: nn.Module
    stored: Stored
    ties: Mapping[str, str]
    arch: Arch | None


def open_folder(directory: str | Path, model_fn: Callable[[], nn.Module] | None = None) -> Opened:
    """Opens a folder in the layout of transformers: config.json and one or more safetensors files.

    Args:
        directory: The folder.
        model_fn: A function without arguments that builds the dense model, for a model that is not part of
            transformers. Its parameters get no memory. None means that the model is built from config.json.

    Raises:
        ArtefactError: The folder holds no weights in safetensors files, or a file is missing or damaged. Or config.json
            is missing or names no model of transformers.
        ModelError: The files do not hold the tensors of the model.

    Example:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> save_file({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "model.safetensors")
        >>> opened = open_folder(".", model_fn=lambda: nn.Linear(2, 3))
        >>> opened.model.weight.device.type, opened.stored["bias"]
        ('meta', tensor([0., 0., 0.]))
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtefactError(f"{directory} is no folder. Give a folder with {CONFIG} and safetensors files.")
    stored = Stored.in_folder(directory)
    # Without buffers, because the values of most buffers are in no file.
    with init_empty_weights(include_buffers=False):
        model = model_fn() if model_fn is not None else _built(directory)
    # While the model was built, each parameter was replaced by an empty one, also where it was tied to another one.
    if callable(retie := getattr(model, "tie_weights", None)):
        retie()
    ties = _ties(model)
    stored = Stored(stored.places, _names_in_files(model, stored, ties))
    _fit(model, stored, directory)
    return Opened(model.eval().requires_grad_(False), stored, ties, TRANSFORMERS.arch_of(model))


def _built(directory: Path) -> nn.Module:
    """Builds the model that config.json describes. No weights are loaded and no code of the folder is run."""
    file = directory / CONFIG
    try:
        config = json.loads(file.read_text())
        name = config["architectures"][0]
    except OSError as error:
        raise ArtefactError(
            f"{directory} holds no {CONFIG}. Give a folder that save_pretrained of transformers wrote, or give "
            "model_fn=, a function that builds the dense model."
        ) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtefactError(
            f'{file} does not name the class of the model: it has no entry "architectures" ({error_text(error)}). Add '
            'it, such as "architectures": ["LlamaForCausalLM"], or give model_fn=.'
        ) from error
    # Private keys say where a model was loaded from.
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        return TRANSFORMERS.build(name, config)
    except ArtefactError:
        raise
    except Exception as error:
        raise ArtefactError(f"transformers cannot build {name} from {file}: {error_text(error)}.") from error


def _ties(model: nn.Module) -> dict[str, str]:
    """Returns further name of a tied tensor -> its first name."""
    first, ties = dict[int, str](), dict[str, str]()
    for name, tensor in tensors(model).items():
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
    return ties


def _names_in_files(model: nn.Module, stored: Stored, ties: Mapping[str, str]) -> dict[str, str]:
    """Returns name of a tensor in the model -> its name in the files, for those that have another name there.

    A tied tensor may be in the files under any of its names.
    """
    others = {name: key for key, name in names_in_model(model, stored.places).items() if name != key}
    groups: dict[str, list[str]] = {}
    for name in tensors(model):
        groups.setdefault(ties.get(name, name), []).append(name)
    for names in groups.values():
        held = next((key for name in names if (key := others.get(name, name)) in stored.places), None)
        others |= {name: held for name in names if held is not None and others.get(name, name) not in stored.places}
    return others


def _fit(model: nn.Module, stored: Stored, directory: Path) -> None:
    """Compares the names and shapes of the model's tensors with those of the files, and takes over the dtypes.

    A buffer that the files hold gets its values. Files may hold tensors that the model does not have. They are left
    out, with a warning.

    Raises:
        ModelError: The files lack a parameter of the model, or it has another shape there.
    """
    ours, empty = tensors(model), stored.empty()
    computed = _not_stored(model)
    missing = [name for name in ours if name not in stored and name not in computed]
    used = {stored.ties.get(name, name) for name in ours}
    more = [name for name in stored.places if name not in used]
    if missing:
        rest = f" The files hold {_listed(more)}, which the model does not have." if more else ""
        raise ModelError(
            f"{directory} does not hold the tensors of {type(model).__name__}: {_listed(missing)}.{rest} Load the "
            "model with from_pretrained of transformers and write it again with save_pretrained, or give model_fn=, a "
            "function that builds the model whose tensors the files hold."
        )
    for name, old in ours.items():
        if name not in stored:
            continue
        new = empty[stored.ties.get(name, name)]
        if new.shape != old.shape:
            raise ModelError(
                f"{name} has the shape {tuple(new.shape)} in {directory}, and {tuple(old.shape)} in "
                f"{type(model).__name__}. The config or model_fn= describes another model."
            )
    # One new parameter for each old one, so that tied parameters stay tied.
    replaced: dict[int, Tensor] = {}
    for name, old in ours.items():
        if name in stored:
            if id(old) not in replaced:
                held: Any = empty[stored.ties.get(name, name)]
                replaced[id(old)] = nn.Parameter(held, False) if isinstance(old, nn.Parameter) else stored[name]
            put(model, name, replaced[id(old)])
    if more:
        warnings.warn(
            f"{directory} holds {_listed(more)}, which {type(model).__name__} does not have. They are left out.",
            stacklevel=4,
        )


def _not_stored(model: nn.Module) -> set[str]:
    """Returns the names of the buffers that no file holds, because the model computes their values when it is built."""
    held = set(model.state_dict())
    return {name for name, _ in model.named_buffers(remove_duplicate=False) if name not in held}


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces the parameter or buffer of a name by another tensor."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, tensor)


def _listed(names: list[str]) -> str:
    """Returns the first names of a list, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
