"""Core: the values that stages hand on (sites, plans, scores, budgets, costs, records) and the contracts of plug-ins.

May import: modules, errors. Nothing here knows an architecture, a criterion or a file format.
"""
