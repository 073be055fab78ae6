"""What a model and each of its units cost, and how a budget is shared out over sites.

May import: surgery, adapters, core, modules, errors. `resources/` is the table of what a budget can
limit, one file each. `count` counts a model, `measure` what each unit of it costs.
"""
