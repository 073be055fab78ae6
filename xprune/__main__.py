"""Runs the command line for `python -m xprune`. Launchers need it: `accelerate launch -m xprune prune ...`."""

from xprune.cli.commands import main

main()
