"""The private names of torch-pruning that this package uses. No other file may use a private name of torch-pruning.

`get_pruning_group`, the public method that walks through the dependency graph, may never end. So `stream_walk` and
`dependency_graph` walk through the graph themselves. Each edge of the graph has mappings, which turn the index of a
feature at one end into the index at the other end. torch-pruning has no public names for the classes of mappings. Any
minor release may rename them, so `pyproject.toml` has an upper bound on the version. If a name is missing,
`tests/test_private_names.py` fails and says which one.
"""

from typing import Any

import torch_pruning as tp
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping, _SliceIndexMapping, _SplitIndexMapping

READ_FROM = "1.6.1"
"""The version of torch-pruning whose source these names were read from."""

JOINS_AND_SPLITS = (_ConcatIndexMapping, _SplitIndexMapping)
"""The classes of mappings of operations that join features, such as torch.cat, or split them."""

SLICES = _SliceIndexMapping
"""The class of mappings of slices, which take a range of an axis."""


def as_index(feature: int) -> list[Any]:
    """Returns the index of one feature as a list in the form that mappings read and return."""
    # torch-pruning stores each index together with the index at the start of the walk, which is not used here.
    return [_HybridIndex(idx=feature, root_idx=feature)]


class Graph(tp.DependencyGraph):
    """The dependency graph of torch-pruning, in which a private flag has a public name.

    The private flag is `_2d_4d`. It is the opposite of `has_tokens`.

    Attributes:
        has_tokens: True if the output of a layer has more than two axes. A reshape is then taken to move tokens. False
            if a reshape is taken to flatten feature maps.
    """

    has_tokens = False

    @property
    def _2d_4d(self) -> bool:
        """The flag that torch-pruning reads. True if a reshape is taken to flatten feature maps."""
        return not self.has_tokens

    @_2d_4d.setter
    def _2d_4d(self, _: bool) -> None:
        """Ignores the value that torch-pruning sets. torch-pruning tests only outputs of nn.Linear for three axes."""
