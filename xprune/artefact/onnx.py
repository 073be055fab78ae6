"""Exports a model to ONNX, and compares the exported file with the model before it appears on disk."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from xprune.artefact.files import check_file
from xprune.errors import ModelError
from xprune.modules.copies import shared_copy, unwrap

_MARK = "written by xprune"
"""A key in the metadata of the file, by which `is_exported` recognises it."""


def export_onnx(model: nn.Module, example_inputs: Tensor, path: str | Path, tolerance: float = 1e-3) -> float:
    """Exports a model to an ONNX file that takes batches of any size.

    The file appears only if onnxruntime returns what torch returns, on the example inputs and on a batch with one more
    sample. Needs the extra `xprune[onnx]`.

    Args:
        model: The model, on any device. It takes one tensor and returns one tensor. It is exported in eval mode and is
            not changed.
        example_inputs: One batch, (samples, ...).
        path: The file to write. Its folder is made if it does not exist. A file that this function wrote before is
            replaced. Any other file is refused.
        tolerance: The largest difference allowed, as a share of max(1, max |output|).

    Returns:
        The largest absolute difference between onnxruntime and torch.

    Raises:
        ModelError: The difference is larger than the tolerance, torch exports nothing, or a package is not installed.
        ArtefactError: There is another file or a folder of that name, or the file cannot be written.

    Example:
        The export needs a few seconds, so this example does not run as a test.

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> error = export_onnx(model, torch.randn(3, 4), "model.onnx")  # doctest: +SKIP
        >>> error < 1e-5  # doctest: +SKIP
        True
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ModelError(f"ONNX export needs {', '.join(missing)}. Run: pip install 'xprune[onnx]'.")
    check_file(path, is_exported)
    model, path = shared_copy(unwrap(model)).cpu(), Path(path).resolve()
    inputs = example_inputs.detach().cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed at the end, so that no unchecked file has the final name.
    temporary = path.with_name(f".{path.name}.part")
    try:
        program = torch.onnx.export(
            model, (inputs,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
        )
        if program is None:
            raise ModelError("torch.onnx.export returned nothing for this model.")
        program.model.metadata_props[_MARK] = "1"
        program.save(str(temporary), external_data=False)
        # The second batch has another size: a size that the export took for fixed shows here.
        error = max(_compare(model, batch, temporary, tolerance) for batch in (inputs, torch.cat((inputs, inputs[:1]))))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return error


def is_exported(path: Path) -> bool:
    """Returns True if a file is an ONNX model that `export_onnx` wrote. Needs the package onnx."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False, format="protobuf")
    except (DecodeError, OSError):
        return False
    return any(entry.key == _MARK for entry in model.metadata_props)


@torch.no_grad()
def _compare(model: nn.Module, inputs: Tensor, file: Path, tolerance: float) -> float:
    """Returns the largest absolute difference between an ONNX file in onnxruntime and the model in torch, on the CPU.

    Raises:
        ModelError: The difference is too large, or not a number.
    """
    import onnxruntime

    expected = model(inputs).numpy()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
    error = float(np.abs(got - expected).max())
    # "not <=" also catches NaN, which is neither larger nor smaller than anything.
    if not error <= tolerance * max(1.0, float(np.abs(expected).max())):
        raise ModelError(
            f"onnxruntime differs from torch by {error:.2e}, which is more than tolerance={tolerance:g} allows. The "
            "file was not written."
        )
    return error
