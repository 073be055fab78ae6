"""Finds the places in a model where units can be removed. `find.find_sites` is the entry point.

There are three ways to find sites:

1. Adapters (`xprune.adapters`) know the attention and MLP classes of common libraries.
2. torch-pruning builds a dependency graph of any model that autograd can trace. It shows hidden neurons (`neurons`) and
   residual streams (`channels`) between layers. `dependency_graph` builds the graph. `placeholders` first replaces
   modules whose sites are known, so that the graph does not look inside them.
3. For attentions and MLPs of an unknown class, `candidates` proposes sites. It looks at the number of heads, the order
   of the linear layers and the shapes of tensors. `by_structure` tries each proposed site on the module.

None of these sites is trusted. Before `find_sites` returns, `in_model` removes units at all sites at once and compares
the pruned model with the gated dense model.

This folder may import surgery, adapters, core, modules and errors. To add another way to find sites, write a file here
and call it in the `find` method of a unit kind in `kinds/`.
"""
