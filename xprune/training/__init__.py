"""Training: loops over data on Accelerate, fine-tuning, evaluation, checkpoints.

May import: tasks, core, modules, errors.
"""
