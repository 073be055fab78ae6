"""Finds the places in a model where units can be removed. `find.find_sites` is the entry point.

There are three ways to find sites:

1. Adapters (`xprune.adapters`) know the attention and MLP classes of common libraries.
2. torch-pruning builds a dependency graph of any model that autograd can trace. It shows hidden neurons (`neurons`) and
   residual streams (`channels`) between layers. `dependency_graph` builds the graph. `placeholders` first replaces
   modules whose sites are known, so that the graph does not look inside them.
3. Attentions and MLPs of any other class are recognised by what they compute. `watch` runs the model once and records
   where. `attentions` and `hidden` name the layers that may read units. `search` finds the site: `footprints` shows the
   rows of each unit, `attributes` the numbers that the forward reads. It proves the site on the module `alone`.

None of these sites is trusted. Before `find_sites` returns, `in_model` removes units at all sites at once and compares
the pruned model with the gated dense model.

This folder may import surgery, adapters, core, modules and errors. To add another way to find sites, write a file here
and call it in the `find` method of a unit kind in `kinds/`.
"""
