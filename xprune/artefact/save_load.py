"""save and load: a pruned model as safetensors + JSON. No pickle, no download, no torch-pruning needed to load."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.artefact import files
from xprune.artefact.files import FORMAT, HEADER, MODEL, REPORT, TENSORS, check_folder, stored_path
from xprune.artefact.rebuild import build, proven
from xprune.core.plan import Plan
from xprune.core.provenance import Arch, provenance, record
from xprune.errors import ArtefactError, PlanError
from xprune.modules.copies import tensors, unwrap
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
) -> Path:
    """Writes model.safetensors and xprune.json; `load` gives the model back in a process that has neither.

    The plan is written relative to the original architecture, however often the model was pruned. An artefact that is
    already there is replaced, and nothing else is: a folder that holds other things is refused. A kill leaves the
    artefact before or the new one, never a mix. A report.html that xprune wrote there stays, with a warning that it
    tells of the model before.

    Args:
        model: The pruned model, or one that was never pruned.
        directory: A new folder, an empty one, or one that holds an artefact.
        arch: A timm name, or (name, keyword arguments). None: taken from the model where it carries them truthfully,
            which a Hugging Face model does in its config. Either way it is proved on the meta device that it rebuilds
            the model. Where none does, a warning says that `load` will need model_fn.
        extra: Plain data to keep beside the model: metrics, settings.
        tensors_beside: What is too large for JSON, such as scores. `read_tensors` reads it.

    Returns:
        The directory.

    Raises:
        ArtefactError: The folder cannot be used (see `check_folder`), `arch` does not rebuild the model, or `extra` is
            no plain data. The folder is then as it was.
    """
    model, directory = unwrap(model), Path(directory)
    check_folder(directory)
    before = provenance(model)
    plan = before.plan if before else Plan((), ())
    found, why = proven(model, plan, arch)
    if found is None:
        warnings.warn(
            f"the architecture is not saved: {why}. load({str(directory)!r}) will need model_fn=, a function that "
            "builds the dense model; or give save(arch=(timm_name, keyword_arguments)).",
            stacklevel=3,
        )
    header = {"format": FORMAT, "arch": found.to_json() if found else None, "plan": plan.to_json()}
    try:
        _write(directory, tensors(model), {**header, "extra": dict(extra or {})}, tensors_beside)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{directory} could not be written: {error}.") from error
    if (directory / REPORT).is_file():
        warnings.warn(
            f"{directory / REPORT} tells of the model that was there before: write it anew, or remove it.", stacklevel=2
        )
    return directory


def _write(directory: Path, named: Mapping[str, Tensor], header: dict[str, Any], beside: Any) -> None:
    """Writes all files beside their places first, and puts them into place once all are whole."""
    undo = files.make_folder(directory)
    try:
        working = files.working_folder(directory)
        try:
            unique, header["ties"] = _unique(named)
            save_file(unique, working / MODEL)
            header["sha256"] = files.sha256(working / MODEL)
            if beside:
                unique, ties = _unique(beside)
                save_file(unique, working / TENSORS)
                header["beside"] = {"ties": ties, "sha256": files.sha256(working / TENSORS)}
            try:
                (working / HEADER).write_text(json.dumps(header, indent=1, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ArtefactError(f"what is to be kept beside the model is no plain data: {error}.") from error
            for path in working.iterdir():
                path.chmod((working / HEADER).stat().st_mode)  # safetensors lets nobody else read
            files.replace(working, directory)
        finally:
            files.remove_working(working)
    except BaseException:
        undo()
        raise


@undisturbed()
def load(directory: str | Path, model_fn: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The saved model, in eval mode, on the CPU.

    model_fn   builds the dense model; needed where the artefact names no architecture, and used instead of it if given

    Reads nothing but the two files, downloads nothing, and compares every shape with the file's header before it
    reads a weight. Raises ArtefactError for a file that is missing, truncated, foreign or tampered with.
    """
    directory = Path(directory)
    header = read_header(directory)
    try:
        plan = Plan.from_json(header["plan"])
        arch = Arch.from_json(header["arch"]) if header["arch"] else None
        ties = {str(name): str(other) for name, other in header["ties"].items()}
    except (PlanError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{directory / HEADER} is tampered with or damaged: {error}") from error
    if model_fn is None and arch is None:
        raise ArtefactError(
            f"{directory} names no architecture: give load(..., model_fn=), a function that builds the dense model."
        )
    dense = model_fn() if model_fn else build(arch) if arch else nn.Module()
    try:
        model = remove_units(dense, plan, ADAPTERS)
    except PlanError as error:
        raise ArtefactError(f"{directory}: {error}") from error
    _fill(model, stored_path(directory / MODEL, header["sha256"]), ties, header["sha256"])
    record(model, plan, arch)
    return model.eval()


def read_header(directory: str | Path) -> dict[str, Any]:
    """The JSON of an artefact; ArtefactError where it is none."""
    path = Path(directory) / HEADER
    try:
        header = json.loads(path.read_text())
    except OSError as error:
        raise ArtefactError(f"{directory} is no saved model: it needs {MODEL} and {HEADER}.") from error
    except ValueError as error:
        raise ArtefactError(f"{path} is not JSON ({error}): truncated, or not ours.") from error
    lacking = files.FIELDS - set(header) if isinstance(header, dict) else files.FIELDS
    if lacking:
        raise ArtefactError(f"{path} was not written by xprune: it lacks {', '.join(sorted(lacking))}.")
    if header["format"] != FORMAT:
        raise ArtefactError(f"{path} is of format {header['format']!r}; this version reads {FORMAT}.")
    if not stored_path(path.parent / MODEL, header["sha256"]).is_file():
        raise ArtefactError(f"{directory} is no saved model: it needs {MODEL} and {HEADER}.")
    return header


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """What `save` was given as tensors_beside, empty where it was nothing; ArtefactError for a file that is not it."""
    header = read_header(directory)
    held, digest = header.get("beside"), files.checksum(header, TENSORS)
    path = stored_path(Path(directory) / TENSORS, digest)
    if held is None:
        return {}
    if not path.is_file() or files.sha256(path) != digest:
        raise ArtefactError(f"{path} is not the file that was saved: it is missing, or its checksum differs.")
    try:
        found = load_file(path)
        return {**found, **{name: found[other] for name, other in held["ties"].items()}}
    except (SafetensorError, KeyError, AttributeError, TypeError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}.") from error


def _fill(model: nn.Module, path: Path, ties: Mapping[str, str], sha256: str) -> None:
    """Puts the file's tensors in the place of the model's, after a comparison of all names and shapes."""
    ours = tensors(model)
    try:
        with safe_open(path, framework="pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
            for name in {**ours, **theirs, **ties}:
                stored = theirs.get(ties.get(name, name))
                if name not in ours or stored != tuple(ours[name].shape):
                    want = tuple(ours[name].shape) if name in ours else "absent"
                    raise ArtefactError(
                        f"{path}: {name} is {stored or 'absent'} in the file, {want} in the architecture."
                    )
            if files.sha256(path) != sha256:
                raise ArtefactError(f"{path} is not the file that was saved: its checksum differs.")
            loaded = {name: file.get_tensor(name).clone() for name in theirs}  # not a view of the file
    except SafetensorError as error:
        raise ArtefactError(f"{path} cannot be read: truncated, or no safetensors file ({error}).") from error
    parameters = {name: nn.Parameter(t, t.is_floating_point()) for name, t in loaded.items()}
    for name, old in ours.items():
        source, (owner, _, attribute) = ties.get(name, name), name.rpartition(".")
        value = parameters[source] if isinstance(old, nn.Parameter) else loaded[source]
        setattr(model.get_submodule(owner), attribute, value)


def _unique(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors under their first name, other name -> first name)."""
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in named.items():
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
    return {name: named[name].detach().cpu().contiguous().clone() for name in first.values()}, ties
