"""Saves a pruned model as safetensors and JSON, and loads it. No pickle is used, and nothing is downloaded.

Loading does not need torch-pruning. An artefact is a folder with two or three files:

- model.safetensors: the weights of the pruned model.
- xprune.json: the header. It has the plan from the dense model to the pruned model, and the architecture of the dense
  model. It also has the names of tied tensors, checksums, and plain data of the user.
- tensors.safetensors: other tensors to keep, such as scores. It is missing if there are none.

The weights of a large model may lie in several files instead, the shards, such as model-00001-0123456789abcdef.
safetensors. The header then has the name and the checksum of each shard.
"""

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.artefact import files
from xprune.artefact.files import FORMAT, HEADER, MODEL, REPORT, SHARDED, TENSORS, check_folder, stored_file
from xprune.artefact.rebuild import build, proved_arch
from xprune.artefact.shards import ShardWriter, Stored
from xprune.core.plan import Plan
from xprune.core.provenance import Arch, provenance, record
from xprune.errors import ArtefactError, PlanError
from xprune.modules.copies import tensors, unwrap
from xprune.modules.refused import SAVE, refuse
from xprune.modules.undisturbed import undisturbed
from xprune.surgery.cut import remove_units


@undisturbed()
def save(
    model: nn.Module,
    directory: str | Path,
    *,
    arch: str | tuple[str, Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors_beside: Mapping[str, Tensor] | None = None,
    max_shard_size: int | None = None,
) -> Path:
    """Writes a model to a folder, from which `load` reads it in another process.

    The plan in the header leads from the original dense model to this one, even if the model was pruned several times.
    If the folder holds an artefact, it is replaced. If the folder holds other files, an error is raised. If the process
    is killed, the folder holds either the old artefact or the new one, never a mix. If the folder holds a report.html
    that xprune wrote, it stays, and a warning says that it describes the old model.

    Args:
        model: The pruned model, or a model that was never pruned.
        directory: A folder that does not exist, is empty, or holds an artefact.
        arch: The architecture of the dense model: a timm name, or a pair (timm name, keyword arguments). If None, the
            model itself has to name it: a timm model has its name as an attribute, and a Hugging Face model has its
            config. In each case, xprune proves that the architecture leads to this model. This needs no memory for
            weights. If `arch` is None and no architecture leads to the model, a warning says that `load` will need
            `model_fn`.
        extra: Plain data to keep with the model, such as metrics and settings.
        tensors_beside: Tensors to keep with the model, such as scores. `read_tensors` reads them.
        max_shard_size: The largest size of a file of weights in bytes. The weights are then written to several files.
            A tensor that is larger has a file of its own. None means one file. Releases before 0.2 read only artefacts
            with one file.

    Returns:
        The folder.

    Raises:
        ArtefactError: The folder cannot be used, see `check_folder`. Or `arch` does not lead to the model. Or `extra`
            is not plain data. In these cases the folder is not changed.
        ModelError: The model holds weights that cannot be saved, such as those of a quantised layer.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=3)
        >>> folder = save(model, "saved")
        >>> sorted(file.name for file in folder.iterdir())
        ['model.safetensors', 'xprune.json']
        >>> type(load(folder)).__name__
        'VisionTransformer'
    """
    model, directory = unwrap(model), Path(directory)
    refuse(model, SAVE)
    check_folder(directory)
    before = provenance(model)
    plan = before.plan if before else Plan((), ())
    found, why = proved_arch(model, plan, arch)
    if found is None:
        warnings.warn(
            f"the architecture is not saved: {why.rstrip('.')}. load({str(directory)!r}) will need model_fn=, a "
            "function that builds the dense model. For a timm model, give save(..., arch=(name, keyword_arguments)) "
            "instead.",
            stacklevel=3,
        )
    header: dict[str, Any] = {"format": FORMAT, "arch": found.to_json() if found else None, "plan": plan.to_json()}
    frozen = [
        name for name, weight in model.named_parameters() if weight.is_floating_point() and not weight.requires_grad
    ]
    # The entry is missing if no weight is frozen, as in artefacts that were written before the entry existed.
    if frozen:
        header["frozen"] = frozen
    try:
        header["extra"] = dict(extra or {})
        _write(directory, tensors(model), header, tensors_beside, max_shard_size)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{directory} could not be written: {error}.") from error
    if (directory / REPORT).is_file():
        warnings.warn(
            f"{directory / REPORT} describes the model that was there before. Write a new report, or remove it.",
            stacklevel=3,
        )
    return directory


def _write(
    directory: Path, named: Mapping[str, Tensor], header: dict[str, Any], beside: Any, shard_size: int | None
) -> None:
    """Writes all files of an artefact to a working folder, and moves them to their final place when they are complete.

    Args:
        directory: The folder of the artefact. If it does not exist, it is made, and removed again after an error.
        named: The tensors of the model, by name.
        header: The header. The names of tied tensors and the checksums are added to it.
        beside: Other tensors to keep, by their names, or None.
        shard_size: The largest size of a file of weights in bytes, or None for one file.
    """
    with files.new_artefact(directory) as working:
        unique, header["ties"] = _without_ties(named)
        if shard_size is None:
            save_file(unique, working / MODEL)
            header["sha256"] = files.sha256(working / MODEL)
        else:
            writer = ShardWriter(working, shard_size)
            # A tensor is dropped from the dict when it is handed over, so that it is freed when its shard is written.
            for name in list(unique):
                writer.add(name, unique.pop(name))
            header |= writer.finish()
        if beside:
            unique, ties = _without_ties(beside)
            save_file(unique, working / TENSORS)
            header["beside"] = {"ties": ties, "sha256": files.sha256(working / TENSORS)}
        files.write_header(working, header)


@undisturbed()
def load(directory: str | Path, model_fn: Callable[[], nn.Module] | None = None, *, offload: bool = False) -> nn.Module:
    """Loads a model that `save` wrote, in eval mode and on the CPU.

    `load` reads only the files of the artefact and downloads nothing. Before it reads any weights, it compares the
    names and shapes of all tensors with those of the model that it has built. If the weights lie in several files, one
    file is read after another.

    Args:
        directory: The folder that `save` wrote.
        model_fn: A function without arguments that builds the dense model. It is needed if the artefact names no
            architecture. If the artefact names one, `model_fn` is used instead.
        offload: If True, the weights stay in the files, for a model that does not fit into memory. Accelerate reads the
            weights of a layer when the layer runs, and drops them afterwards. Such a model can be run, but not be
            pruned, trained or saved, and the files have to stay where they are.

    Returns:
        The pruned model.

    Raises:
        ArtefactError: A file is missing, truncated, changed, or not written by xprune. Or the weights or the plan do
            not fit the dense model.

    Example:
        >>> import torch
        >>> def build(): return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> model = build().eval()
        >>> folder = save(model, "saved")  # warns that the architecture is not saved
        >>> x = torch.randn(3, 4)
        >>> torch.equal(load(folder, model_fn=build)(x), model(x))
        True
    """
    directory = Path(directory)
    header = read_header(directory)
    try:
        plan = Plan.from_json(header["plan"])
        arch = Arch.from_json(header["arch"]) if header["arch"] else None
        ties = {str(name): str(other) for name, other in header["ties"].items()}
        frozen = frozenset(str(name) for name in header.get("frozen", ()))
    except (PlanError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{directory / HEADER} is damaged or was changed by hand: {error}") from error
    if model_fn is None and arch is None:
        raise ArtefactError(
            f"{directory} names no architecture. Give load(..., model_fn=), a function that builds the dense model."
        )
    # Without model_fn, the dense model is on the meta device, and the weights of the file replace its parameters.
    # `model_fn` may wrap the model, for example with DistributedDataParallel, as the caller's program does.
    dense = unwrap(model_fn()) if model_fn else build(arch) if arch else nn.Module()
    try:
        model = remove_units(dense, plan, ADAPTERS)
    except PlanError as error:
        raise ArtefactError(f"{directory}: {error}") from error
    weights = files.weight_files(directory, header)
    _check_weights(model, weights, ties)
    if offload:
        _offload(model, list(weights), ties)
    else:
        _fill(model, list(weights), ties, frozen)
    record(model, plan, arch)
    return model.eval()


def read_header(directory: str | Path) -> dict[str, Any]:
    """Reads the header of an artefact, for example to get the data that `save` was given as `extra`.

    Args:
        directory: The folder that `save` wrote.

    Returns:
        The header as plain data. Its keys are "format", "arch", "plan", "ties", "sha256" and "extra". If `save` was
        given tensors, there is also "beside". If the model has parameters with requires_grad=False, "frozen" has their
        names. If the weights lie in several files, "shards" has their names and checksums, and "sha256" is None.

    Raises:
        ArtefactError: The folder holds no artefact, or one of another version of the format.

    Example:
        >>> folder = save(nn.Linear(2, 3), "saved", extra={"accuracy": 0.75})
        >>> read_header(folder)["extra"]
        {'accuracy': 0.75}
    """
    file = Path(directory) / HEADER
    try:
        header = json.loads(file.read_text())
    except OSError as error:
        raise ArtefactError(f"{directory} is no saved model: it needs the files {MODEL} and {HEADER}.") from error
    except ValueError as error:
        raise ArtefactError(f"{file} is not JSON ({error}). It is truncated, or xprune did not write it.") from error
    lacking = files.FIELDS - set(header) if isinstance(header, dict) else files.FIELDS
    if lacking:
        raise ArtefactError(f"{file} was not written by xprune: it has no {', '.join(sorted(lacking))}.")
    if header["format"] != (SHARDED if "shards" in header else FORMAT):
        raise ArtefactError(
            f"{file} is of format {header['format']!r}, and this version of xprune reads format {FORMAT}, and format "
            f"{SHARDED} for weights in several files. Read it with the version that wrote it."
        )
    for weights in files.weight_files(file.parent, header):
        if not weights.is_file():
            raise ArtefactError(f"{directory} is no saved model: it needs the files {weights.name} and {HEADER}.")
    return header


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """Reads the tensors that `save` was given as `tensors_beside`.

    Args:
        directory: The folder that `save` wrote.

    Returns:
        Name -> tensor, on the CPU. The dict is empty if `save` was given no tensors.

    Raises:
        ArtefactError: The folder holds no artefact, or the file of the tensors is missing or was changed.

    Example:
        >>> import torch
        >>> folder = save(nn.Linear(2, 3), "saved", tensors_beside={"scores": torch.tensor([0.5, 2.0])})
        >>> read_tensors(folder)
        {'scores': tensor([0.5000, 2.0000])}
    """
    header = read_header(directory)
    held, digest = header.get("beside"), files.checksum(header, TENSORS)
    file = stored_file(Path(directory) / TENSORS, digest)
    if held is None:
        return {}
    if not file.is_file() or files.sha256(file) != digest:
        raise ArtefactError(f"{file} is not the file that was saved: it is missing, or its checksum differs.")
    try:
        found = load_file(file)
        return {**found, **{name: found[other] for name, other in held["ties"].items()}}
    except (SafetensorError, KeyError, AttributeError, TypeError) as error:
        raise ArtefactError(f"{file} cannot be read: {error}.") from error


def _check_weights(model: nn.Module, weights: Mapping[Path, str], ties: Mapping[str, str]) -> None:
    """Checks that the files of the weights are those that were saved, and that they fit a model.

    Args:
        model: The pruned model. Its parameters may be on the meta device.
        weights: The files, each with the checksum that it has to have.
        ties: Name of a tied tensor -> the name under which a file holds it.

    Raises:
        ArtefactError: The files do not fit the model, are not those that were saved, or cannot be read.
    """
    ours, theirs, where = tensors(model), dict[str, tuple[int, ...]](), dict[str, Path]()
    for file in weights:
        with _reading(file) as opened:
            # The shapes are at the beginning of the file, so nothing large is read yet.
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
        theirs |= shapes
        where |= dict.fromkeys(shapes, file)
    for name in {**ours, **theirs, **ties}:
        stored = theirs.get(ties.get(name, name))
        if name not in ours or stored != tuple(ours[name].shape):
            want = tuple(ours[name].shape) if name in ours else "absent"
            file = where.get(ties.get(name, name), next(iter(weights)))
            raise ArtefactError(
                f"{file}: {name} is {stored or 'absent'} in the file, {want} in the architecture. The dense "
                "model is not the one that was saved, or the file was changed."
            )
    for file, sha256 in weights.items():
        if files.sha256(file) != sha256:
            raise ArtefactError(f"{file} is not the file that was saved: its checksum differs.")


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """Opens a safetensors file for a `with` block. An error that safetensors raises becomes an ArtefactError."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ArtefactError(f"{file} cannot be read: it is truncated, or not a safetensors file ({error}).") from error


def _fill(model: nn.Module, weights: Sequence[Path], ties: Mapping[str, str], frozen: Collection[str] = ()) -> None:
    """Replaces the tensors of a model by those in its files, one file after another.

    Args:
        model: The pruned model, which is changed. Its parameters may be on the meta device.
        weights: The files. `_check_weights` has compared them with the model.
        ties: Name of a tied tensor -> the name under which a file holds it.
        frozen: The names of the parameters that get requires_grad=False.
    """
    ours, places = tensors(model), dict[str, list[str]]()
    for name in ours:
        places.setdefault(ties.get(name, name), []).append(name)
    for file in weights:
        with _reading(file) as opened:
            for stored in opened.keys():  # noqa: SIM118 - it is no mapping
                # safetensors returns views of the file. With copies, the file can be replaced while the model is in
                # use.
                tensor = opened.get_tensor(stored).clone()
                # There is one parameter for each stored tensor, so that tied names share it.
                parameter = nn.Parameter(tensor, tensor.is_floating_point() and stored not in frozen)
                for name in places[stored]:
                    value = parameter if isinstance(ours[name], nn.Parameter) else tensor
                    owner, _, attribute = name.rpartition(".")
                    setattr(model.get_submodule(owner), attribute, value)


def _offload(model: nn.Module, weights: Sequence[Path], ties: Mapping[str, str]) -> None:
    """Makes a model read its parameters from its files whenever a layer runs. Buffers are read now.

    Args:
        model: The pruned model, which is changed.
        weights: The files. `_check_weights` has compared them with the model.
        ties: Name of a tied tensor -> the name under which a file holds it.
    """
    stored = Stored.in_files(list(weights), ties)
    empty = stored.empty()
    for name, old in tensors(model).items():
        owner, _, attribute = name.rpartition(".")
        # The parameters need the dtype of the file, since Accelerate converts what it reads to the dtype that it finds.
        value = nn.Parameter(empty[ties.get(name, name)], False) if isinstance(old, nn.Parameter) else stored[name]
        setattr(model.get_submodule(owner), attribute, value)
    cpu_offload(model, torch.device("cpu"), state_dict=stored)


def _without_ties(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Finds tied tensors, so that the file holds each of them once and `load` can tie them again.

    Args:
        named: Name -> tensor. A tied tensor has several names.

    Returns:
        (tensors, ties). `tensors` has a copy of each tensor on the CPU, under its first name. `ties` has further name
        -> first name.
    """
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in named.items():
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
    return {name: named[name].detach().cpu().contiguous().clone() for name in first.values()}, ties
