"""The private names of torch-pruning that this package uses. No other file may use one.

torch-pruning's public walk (`get_pruning_group`) may never end, so `stream_walk` and `dependency_graph` walk its graph
themselves. The edges of the graph map indices of features, and torch-pruning has no public names for these mappings.
They may move in any minor release, hence the upper bound in `pyproject.toml`. `tests/test_private_names.py` says which
one moved.
"""

from typing import Any

import torch_pruning as tp
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping, _SliceIndexMapping, _SplitIndexMapping

READ_FROM = "1.6.1"
"""The version of torch-pruning whose source these names were read from."""

JOINS_AND_SPLITS = (_ConcatIndexMapping, _SplitIndexMapping)
"""Mappings across operations that put features one after another, or take them apart."""
SLICES = _SliceIndexMapping
"""The mapping across an operation that takes a range of an axis."""


def as_index(feature: int) -> list[Any]:
    """Returns one feature in the form that mappings take and return."""
    return [_HybridIndex(idx=feature, root_idx=feature)]


class Graph(tp.DependencyGraph):
    """torch-pruning's graph, with one of its flags under a name that says what it means.

    Attributes:
        has_tokens: True if a layer's output has more than two axes. A reshape then moves tokens. If False, a reshape
            flattens maps.
    """

    has_tokens = False

    @property
    def _2d_4d(self) -> bool:
        return not self.has_tokens

    @_2d_4d.setter
    def _2d_4d(self, _: bool) -> None:
        """Ignores what torch-pruning sets: its own guess looks at outputs of three axes only."""
