"""Artefacts: a pruned model as files (safetensors and JSON, ONNX), and back.

May import: surgery, adapters, core, modules, errors. One more library of models is a file in `libraries/` and a line
in its table.
"""

from xprune.artefact.save_load import load, read_header, read_tensors, save

__all__ = ["load", "read_header", "read_tensors", "save"]
