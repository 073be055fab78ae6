"""Measures the cost of a model and of its units, and decides how many units each site may keep within a budget.

- `count` counts the MACs, parameters and other resources of one model. `latency` measures its time.
- `measure` measures how the cost of a model depends on the units that each site keeps.
- `allocation` finds numbers of kept units that meet a budget. Selections use it.
- `expected` computes the cost of masks, which are probabilities that units are kept, while masks are learned.
- `resources/` holds the table of the resources that a budget can limit, with one file for each resource.

This folder may import surgery, adapters, core, modules and errors.
"""
