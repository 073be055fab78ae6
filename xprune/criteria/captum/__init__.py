"""Captum's attribution methods as criteria, over gates or at layers. `methods` makes a class for each name.

May import: what `criteria` may. A new class of Captum is found by itself; one that cannot score units gets a line in
`methods.REFUSED` that says why.
"""
