"""Modules: plumbing of torch's nn.Module that knows nothing of pruning: copies, paths, nested inputs, norms.

May import: errors.
"""
