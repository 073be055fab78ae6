"""export: a model as ONNX, with its outputs compared in onnxruntime before the file is handed over."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from xprune.artefact.files import check_file
from xprune.errors import ModelError
from xprune.modules.copies import shared_copy, unwrap

_MARK = "written by xprune"


def export_onnx(model: nn.Module, example_inputs: Tensor, path: str | Path, tolerance: float = 1e-3) -> float:
    """Writes an ONNX file with a free batch size.

    The file appears only if onnxruntime agrees on the example inputs and on a batch of one more row.

    Args:
        model: The model, on any device. It is not changed.
        example_inputs: One batch, (rows, ...).
        path: The file to write. A file that this function wrote before is replaced, any other is refused.
        tolerance: onnxruntime may differ by tolerance x max(1, max |output|).

    Returns:
        The largest difference between onnxruntime and torch.

    Raises:
        ModelError: onnxruntime differs by more, or an extra is not installed.
        ArtefactError: Another file is there.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ModelError(f"ONNX export needs {', '.join(missing)}: pip install 'xprune[onnx]'.")
    check_file(path, is_exported)
    model, path = shared_copy(unwrap(model)).cpu(), Path(path).resolve()
    inputs = example_inputs.detach().cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        program = torch.onnx.export(
            model, (inputs,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
        )
        if program is None:
            raise ModelError("torch.onnx.export gave nothing.")
        program.model.metadata_props[_MARK] = "1"
        program.save(str(temporary), external_data=False)
        error = max(_compare(model, batch, temporary, tolerance) for batch in (inputs, torch.cat((inputs, inputs[:1]))))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return error


def is_exported(path: Path) -> bool:
    """Whether the file is one that `export_onnx` wrote."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False, format="protobuf")
    except (DecodeError, OSError):
        return False
    return any(entry.key == _MARK for entry in model.metadata_props)


@torch.no_grad()
def _compare(model: nn.Module, inputs: Tensor, path: Path, tolerance: float) -> float:
    import onnxruntime

    expected = model(inputs).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
    error = float(np.abs(got - expected).max())
    if not error <= tolerance * max(1.0, float(np.abs(expected).max())):
        raise ModelError(f"onnxruntime is off by {error:.2e} from torch; the file was not written.")
    return error
