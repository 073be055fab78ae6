"""Loops over data on Hugging Face Accelerate: evaluation, fine-tuning, and the state that a killed run goes on from.

May import: tasks, core, modules, errors. A new loop is built from `loop` and `runtime`, and keeps its state with
`checkpoint`.
"""
