"""The private names of torch-pruning that this package uses. No other file may use a private name of torch-pruning.

The public walk of torch-pruning, `get_pruning_group`, may never end. So `stream_walk` and `dependency_graph` walk its
graph on their own. The edges of the graph map the indices of features, and torch-pruning has no public names for these
mappings. Any minor release may rename them, so `pyproject.toml` has an upper bound. `tests/test_private_names.py` then
names the one that is missing.
"""

from typing import Any

import torch_pruning as tp
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping, _SliceIndexMapping, _SplitIndexMapping

READ_FROM = "1.6.1"
"""The version of torch-pruning whose source these names were read from."""

JOINS_AND_SPLITS = (_ConcatIndexMapping, _SplitIndexMapping)
"""The mappings of operations that join features or split them."""

SLICES = _SliceIndexMapping
"""The mapping of an operation that takes a range of an axis."""


def as_index(feature: int) -> list[Any]:
    """Returns the index of one feature in the form that mappings take and return."""
    # torch-pruning stores an index together with the index at the root of the walk, which is not used here.
    return [_HybridIndex(idx=feature, root_idx=feature)]


class Graph(tp.DependencyGraph):
    """The graph of torch-pruning, with a plain name for one of its flags.

    The flag, `_2d_4d`, is the opposite of `has_tokens`.

    Attributes:
        has_tokens: True if the output of a layer has more than two axes. A reshape then moves tokens. False if a
            reshape flattens maps.
    """

    has_tokens = False

    @property
    def _2d_4d(self) -> bool:
        """Returns the flag that torch-pruning reads: True if a reshape flattens maps."""
        return not self.has_tokens

    @_2d_4d.setter
    def _2d_4d(self, _: bool) -> None:
        """Ignores the value that torch-pruning sets, since it only looks at outputs with three axes."""
