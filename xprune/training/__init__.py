"""Training and evaluation on Hugging Face Accelerate, in one process or several.

- `evaluate` and `finetune` are the functions that users call.
- `loop` takes gradient steps. All learners of the package use it. `checkpoint` keeps its state, so that a killed run
  can resume. `optim` has learning rates and groups of weights.
- `runtime` prepares devices, processes and loaders. `accelerate_state` leaves the caller's Accelerate as it was.

To add a learner, build it from `loop` and `runtime`. This folder may import tasks, core, modules and errors.
"""
