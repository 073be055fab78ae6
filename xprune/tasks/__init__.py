"""How to read a batch, and what its loss and metric are: for classes, tokens, pixels, nodes and graphs.

May import: core, modules, errors. To add one: a subclass of `core.task.Task` in a file of its own.
"""
