"""Prunes a model that does not fit into memory. The weights stay in their files, and one block is in memory at a time.

- `folder` opens a folder of weights: the model without values, and the tensors, which are read one by one.
- `blocks` finds the list of blocks, and the sites of all blocks from those of the first one.
- `walk` runs the model's forward with one block in memory at a time.
- `scoring` scores the units of one block after another.
- `prune` has `prune_folder`, which puts the stages together.

This folder may import pipeline and everything below it. A criterion takes part if it sets `Criterion.needs`.
"""
