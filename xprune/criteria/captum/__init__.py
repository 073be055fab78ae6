"""Criteria from the attribution methods of Captum. `methods` makes a criterion for each attribution class.

For developers of xprune: these files may import the same packages as `criteria`. A new attribution class of Captum
becomes a criterion without a change here. If it cannot score units, add a line with the reason to `methods.REFUSED`.
"""
