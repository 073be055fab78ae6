"""What a model and each of its units cost, and how a budget is shared out over sites.

May import: surgery, adapters, core, modules, errors. What a budget can limit is measured in `measure`.
"""
