"""The command line: its commands, what they are given by name, and the demo.

May import everything. A new command is a function in `commands`.
"""

from xprune.cli.commands import app, main
from xprune.moved import forward

__all__ = ["app", "main"]

forward("cli")
