"""Training and evaluation with Hugging Face Accelerate, in one process or several.

- `evaluate` and `finetune` are the functions that users call.
- `loop` takes gradient steps. All training in the package uses it.
- `checkpoint` writes the state of a loop to a file, so that a killed run can resume.
- `master` converts half-precision models to float32 for the training, and back.
- `optim` has learning rates and groups of parameters.
- `runtime` prepares devices, processes and loaders.
- `accelerate_state` restores the caller's settings of Accelerate.

To train something else, build on `loop` and `runtime`. This folder may import tasks, core, modules and errors.
"""
