"""Finds the places in a model where units can be removed. `find.find_sites` is the entry point.

Sites come from three sources:

1. Adapters (`xprune.adapters`) know the attention and MLP classes of common libraries.
2. The dependency graph of torch-pruning shows hidden neurons (`neurons`) and residual streams (`channels`) between the
   layers of any model that autograd can trace. `dependency_graph` builds it, and `placeholders` hides from it the
   modules that are known already.
3. For attentions and MLPs of an unknown class, `candidates` proposes sites by structure: the number of heads, the order
   of the linear layers, the shapes of tensors. `by_structure` tries each proposal on the module.

No source is trusted. Before a site is handed out, `in_model` removes units at all sites at once and compares the pruned
model with the gated dense model.

May import: surgery, adapters, core, modules, errors. A new way to find sites is a file here, called by the `find`
method of a unit kind in `kinds/`.
"""
