"""Tasks: how to read a batch, the loss and the metric, a file each for classes, tokens, pixels and graphs.

May import: core, modules, errors. One more task is a subclass of `core.task.Task` in a file of its own.
"""
