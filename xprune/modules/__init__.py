"""Helpers for `torch.nn.Module`: copies, dotted paths, nested inputs, norm layers, exact arithmetic, random states.

`refused` lists the kinds of modules that xprune cannot work with.

The code here does not know about pruning. For developers of xprune: these files may import `xprune.errors`. A new
helper belongs in the file of its subject.
"""
