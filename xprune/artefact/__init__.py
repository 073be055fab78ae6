"""A pruned model as files (safetensors and JSON, or ONNX), and back. `files` decides what may be overwritten.

May import: surgery, adapters, core, modules, errors. To save models of one more library: a file in `libraries/`, and a
line in its table.
"""

from xprune.artefact.save_load import load, read_header, read_tensors, save

__all__ = ["load", "read_header", "read_tensors", "save"]
