"""Defines the values that the stages hand to each other, and the base classes of plug-ins.

The values are sites, scores, plans, budgets and costs.

For developers of xprune: these files may import `xprune.modules` and `xprune.errors`. They know no architecture, no
criterion and no file format. A new value is a frozen dataclass in a new file.
"""
