"""Exports a model to ONNX. The exported file is compared with the model before it gets its final name."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from xprune.artefact.files import check_file
from xprune.errors import ModelError
from xprune.modules.copies import shared_copy, unwrap
from xprune.modules.forward import error_text

_MARK = "written by xprune"
"""A key in the metadata of each exported file. `is_exported` recognises the file by it."""


def export_onnx(model: nn.Module, example_inputs: Tensor, path: str | Path, tolerance: float = 1e-3) -> float:
    """Exports a model to an ONNX file that accepts batches of any size.

    The file is written only if onnxruntime gives the same outputs as torch, for the example inputs and for a batch with
    one more sample. This function needs the extra `xprune[onnx]`.

    Args:
        model: The model, on any device. Its forward has to have one input tensor and one output tensor. A copy is
            exported in eval mode, so the model is not changed.
        example_inputs: One batch, (samples, ...).
        path: The file to write. Its folder is made if it does not exist. If the file exists and this function wrote it,
            it is replaced. If it exists and is any other file, an error is raised.
        tolerance: The largest difference that is allowed, as a fraction of max(1, max |output|).

    Returns:
        The largest absolute difference between onnxruntime and torch.

    Raises:
        ModelError: The difference is larger than the tolerance, torch exports nothing, or a package is not installed.
        ArtefactError: There is a folder of this name, or a file that this function did not write, or the file cannot be
            written.

    Example:
        The export takes a few seconds:

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
    if not isinstance(example_inputs, Tensor):
        raise ModelError(
            f"export_onnx takes one input tensor, and the example inputs are a {type(example_inputs).__name__}. Export "
            "the model with torch.onnx.export, which takes any inputs."
        )
    inputs = example_inputs.detach().cpu()
    _check_output(model, inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file gets its final name only after the check, so that no unchecked file has this name.
    temporary = path.with_name(f".{path.name}.part")
    try:
        try:
            program = torch.onnx.export(
                model, (inputs,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
            )
        # The exporter of torch has many kinds of errors. Their texts say which operation it does not know.
        except Exception as problem:
            raise ModelError(
                f"torch.onnx.export cannot export {type(model).__name__}: {error_text(problem)[:500]}. No file was "
                "written."
            ) from problem
        if program is None:
            raise ModelError("torch.onnx.export returned nothing for this model.")
        program.model.metadata_props[_MARK] = "1"
        program.save(str(temporary), external_data=False)
        # The second batch has another size, because the export may have fixed the size of the first batch.
        error = max(_compare(model, batch, temporary, tolerance) for batch in (inputs, torch.cat((inputs, inputs[:1]))))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return error


@torch.no_grad()
def _check_output(model: nn.Module, inputs: Tensor) -> None:
    """Raises ModelError if the model does not run on the inputs, or returns anything but one float32 tensor."""
    try:
        output = model(inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on one tensor {tuple(inputs.shape)}: {error_text(error)}. "
            "export_onnx takes models with one input tensor. Export other models with torch.onnx.export."
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{type(model).__name__} returns a {type(output).__name__}, and export_onnx takes models that return one "
            "tensor. Put the model into a module that returns this tensor, or use torch.onnx.export."
        )
    if output.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"{type(model).__name__} computes in {output.dtype}, which the comparison with onnxruntime does not "
            "support. Give model.float() and inputs in float32."
        )


def is_exported(path: Path) -> bool:
    """Returns True if a file is an ONNX model that `export_onnx` wrote, else False. Needs the package onnx."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False, format="protobuf")
    except (DecodeError, OSError):
        return False
    return any(entry.key == _MARK for entry in model.metadata_props)


@torch.no_grad()
def _compare(model: nn.Module, inputs: Tensor, file: Path, tolerance: float) -> float:
    """Returns the largest absolute difference between the outputs of an ONNX file and of the model, on the CPU.

    onnxruntime runs the file, and torch runs the model.

    Args:
        model: The model, on the CPU and in eval mode.
        inputs: One batch.
        file: The ONNX file.
        tolerance: The largest difference that is allowed, as a fraction of max(1, max |output|).

    Raises:
        ModelError: The difference is larger than the tolerance, or NaN.
    """
    import onnxruntime

    expected = model(inputs).numpy()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
    error = float(np.abs(got - expected).max())
    # "not <=" also catches NaN, for which every comparison is False.
    if not error <= tolerance * max(1.0, float(np.abs(expected).max())):
        raise ModelError(
            f"onnxruntime differs from torch by {error:.2e}, which is more than tolerance={tolerance:g} allows. The "
            "file was not written."
        )
    return error
