"""`python -m xprune`, for launchers that start a module: `accelerate launch -m xprune prune ...`."""

from xprune.cli import main

main()
