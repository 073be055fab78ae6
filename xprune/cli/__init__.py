"""The command line. `commands` holds the commands, `inputs` loads the models and data that they name.

`demo` holds the command `xprune demo`. May import everything. To add a command, write a function in `commands`.
"""

from xprune.cli.commands import app, main
from xprune.moved import forward

__all__ = ["app", "main"]

forward("cli")
