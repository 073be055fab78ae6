"""Tasks: how a batch is read, and what loss and metric are, for classes, tokens, pixels, nodes and graphs.

To add a task, write a subclass of `core.task.Task` in a file of its own. This folder may import core, modules and
errors.
"""
