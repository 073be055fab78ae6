"""Criteria from Captum's attribution methods, applied to gates or to layers. `methods` makes a class for each name.

May import: the same as `criteria`. A new attribution class of Captum becomes a criterion without a change here. If it
cannot score units, it needs a line in `methods.REFUSED` that says why.
"""
