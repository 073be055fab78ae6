"""Values that the stages hand to each other (sites, scores, plans, budgets, costs), and the base classes of plug-ins.

May import: modules, errors. The code here knows no architecture, no criterion and no file format. A new value is a
frozen dataclass in a new file.
"""
