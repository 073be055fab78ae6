"""Saves a pruned model to files and loads it again. The files are safetensors and JSON, or ONNX. No pickle is used.

The folder that `save` writes is called an artefact.

- `save_load` has `save` and `load`.
- `files` decides which files may be replaced, and replaces an artefact in steps that survive a kill.
- `rebuild` finds the architecture of the dense model, so that `load` can build it.
- `portable` lists the modules because of which a pickle of the model would need xprune.
- `onnx` exports a model to ONNX and checks the exported file.
- `libraries/` has the libraries whose models can be built from a name, such as timm.

This folder may import surgery, adapters, core, modules and errors. To support the models of one more library, add a
file to `libraries/` and a line to its table.
"""

from xprune.artefact.save_load import load, read_header, read_tensors, save

__all__ = ["load", "read_header", "read_tensors", "save"]
