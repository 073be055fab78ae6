"""Tasks: each one says how a batch is read, and what the loss and the metric are.

There are tasks for classes of samples, tokens, pixels, nodes and graphs. To add a task, write a subclass of
`core.task.Task` in a separate file. This folder may import core, modules and errors.
"""
