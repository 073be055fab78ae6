"""Captum's attribution methods as criteria: over gates, or at layers. `methods` makes a class for each name."""
