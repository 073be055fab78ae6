"""Saves a pruned model as files and loads it again: safetensors and JSON, or ONNX. No pickle.

- `save_load`: `save` and `load`.
- `files`: decides which files may be replaced, and replaces an artefact in steps that survive a kill.
- `rebuild`: finds the name and arguments of the dense model, so that `load` can build it.
- `portable`: lists the modules for which a pickle of the model would need xprune.
- `onnx`: exports a model and checks the exported file.
- `libraries/`: the libraries whose models are saved by name.

May import: surgery, adapters, core, modules, errors. To save models of one more library by name, add a file to
`libraries/` and a line to its table.
"""

from xprune.artefact.save_load import load, read_header, read_tensors, save

__all__ = ["load", "read_header", "read_tensors", "save"]
