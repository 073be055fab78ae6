"""What a model and each of its units cost, and how a selection spends a budget on the sites.

- `count` counts the MACs, parameters and other resources of one model. `latency` times it.
- `measure` measures how the cost depends on the units that each site keeps.
- `allocation` finds the numbers of units that meet a budget. `expected` does so for masks that are still learned.
- `resources/` is the table of what a budget can limit, with one file for each resource.

This folder may import surgery, adapters, core, modules and errors.
"""
