"""save and load: a pruned model as safetensors + JSON. No pickle, no download, no torch-pruning needed to load."""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.artefact.rebuild import build, proven
from xprune.core.plan import Plan
from xprune.core.provenance import Arch, provenance, record
from xprune.errors import ArtefactError, PlanError
from xprune.modules.copies import tensors, unwrap
from xprune.surgery.cut import remove_units

FORMAT = 1
MODEL, HEADER, TENSORS = "model.safetensors", "xprune.json", "tensors.safetensors"


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    arch: str | tuple[str, Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors_beside: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes model.safetensors and xprune.json; `load` gives the model back in a process that has neither.

    arch    a timm name, or (name, keyword arguments); None: taken from the model where it carries them truthfully,
            which a Hugging Face model does in its config. Either way it is proved on the meta device that it rebuilds
            the model. Where none does, a warning says that `load` will need model_fn.
    extra   plain data to keep beside the model (metrics, settings)
    tensors_beside   what is too large for JSON (scores), in tensors.safetensors; `read_tensors` reads it

    The plan is written relative to the original architecture, however often the model was pruned. An earlier
    artefact at the same place is replaced as a whole; anything else there is an ArtefactError.
    """
    model, directory = unwrap(model), Path(directory)
    before = provenance(model)
    plan = before.plan if before else Plan((), ())
    found, why = proven(model, plan, arch)
    if found is None:
        warnings.warn(
            f"the architecture is not saved: {why}. load({str(directory)!r}) will need model_fn=, a function that "
            "builds the dense model; or give save(arch=(timm_name, keyword_arguments)).",
            stacklevel=2,
        )
    refuse_foreign(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        unique, ties = _unique(tensors(model))
        save_file(unique, working / MODEL)
        header = {
            "format": FORMAT,
            "arch": found.to_json() if found else None,
            "plan": plan.to_json(),
            "ties": ties,
            "sha256": _sha256(working / MODEL),
            "extra": dict(extra or {}),
        }
        if tensors_beside:
            beside, same = _unique(tensors_beside)
            save_file(beside, working / TENSORS)
            header["beside"] = {"ties": same, "sha256": _sha256(working / TENSORS)}
        (working / HEADER).write_text(json.dumps(header, indent=1, allow_nan=False))
        working.chmod(0o755)
        _replace(working, directory)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return directory


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
    _fill(model, directory / MODEL, ties, header["sha256"])
    record(model, plan, arch)
    return model.eval()


def read_header(directory: str | Path) -> dict[str, Any]:
    """The JSON of an artefact; ArtefactError where it is none."""
    path = Path(directory) / HEADER
    if not path.is_file() or not (path.parent / MODEL).is_file():
        raise ArtefactError(f"{directory} is no saved model: it needs {MODEL} and {HEADER}.")
    try:
        header = json.loads(path.read_text())
    except ValueError as error:
        raise ArtefactError(f"{path} is not JSON ({error}): truncated, or not ours.") from error
    wanted = {"format", "arch", "plan", "ties", "sha256", "extra"}
    if not isinstance(header, dict) or not wanted <= set(header):
        raise ArtefactError(f"{path} was not written by xprune: it lacks {', '.join(sorted(wanted - set(header)))}.")
    if header["format"] != FORMAT:
        raise ArtefactError(f"{path} is of format {header['format']!r}; this version reads {FORMAT}.")
    return header


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """What `save` was given as tensors_beside, empty where it was nothing; ArtefactError for a file that is not it."""
    held, path = read_header(directory).get("beside"), Path(directory) / TENSORS
    if held is None:
        return {}
    if not path.is_file() or not isinstance(held, dict) or _sha256(path) != held.get("sha256"):
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
            if _sha256(path) != sha256:
                raise ArtefactError(f"{path} is not the file that was saved: its checksum differs.")
            loaded = {name: file.get_tensor(name).clone() for name in theirs}  # not a view of the file
    except SafetensorError as error:
        raise ArtefactError(f"{path} cannot be read: truncated, or no safetensors file ({error}).") from error
    parameters = {name: nn.Parameter(t, t.is_floating_point()) for name, t in loaded.items()}
    for name, old in ours.items():
        source, (owner, _, attribute) = ties.get(name, name), name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(old, nn.Parameter):
            module._parameters[attribute] = parameters[source]
        else:
            module._buffers[attribute] = loaded[source]


def _unique(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors under their first name, other name -> first name)."""
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in named.items():
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
    return {name: named[name].detach().cpu().contiguous().clone() for name in first.values()}, ties


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_foreign(directory: Path) -> None:
    """ArtefactError where the directory holds anything but an artefact: worth asking before hours of work."""
    if directory.exists() and not (
        directory.is_dir() and ((directory / HEADER).is_file() or not any(directory.iterdir()))
    ):
        raise ArtefactError(
            f"{directory} exists and is no saved model; give a new directory, or an old artefact to replace."
        )


def _replace(working: Path, directory: Path) -> None:
    """Renames the finished directory into place; the old one goes only after that."""
    old = None
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        directory.rename(old / "artefact")
    working.rename(directory)
    if old:
        shutil.rmtree(old)
