"""Helpers for `torch.nn.Module`: copies, dotted paths, nested inputs, norms, arithmetic. Nothing here knows of pruning.

May import: errors. A new helper goes into the file of its subject.
"""
