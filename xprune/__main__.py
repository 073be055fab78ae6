"""`python -m xprune`, for launchers that start a module: `accelerate launch -m xprune prune ...`."""

from xprune.cli.commands import main

main()
