"""What the stages hand to each other (sites, scores, plans, budgets, costs, records), and the contracts of plug-ins.

May import: modules, errors. Nothing here knows an architecture, a criterion or a file format. A new value is a frozen
dataclass in a file of its own.
"""
