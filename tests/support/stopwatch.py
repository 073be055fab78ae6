"""A stopwatch that measures nothing: times that a test chooses, so that no test depends on the speed of a computer."""

from dataclasses import replace
from typing import ClassVar

from xprune.core.target import Target
from xprune.core.times import Times


def fake_stopwatch(dense=8.0, pruned=5.0, rows=None, **target):
    """Returns a class to use in place of `Stopwatch`, with the list of all stopwatches that were made of it.

    Args:
        dense: The time of the dense model, in milliseconds.
        pruned: The time of any other model. In most rounds their ratio is dense / pruned.
        rows: The number of samples that the target gets. None leaves it as it is.
        **target: Values of the target in use, such as device="cuda".
    """

    class Fake:
        made: ClassVar = []

        def __init__(self, given, model, inputs, batch_axis=None):
            self.given, self.model, self.inputs, self.batch_axis = given, model, inputs, batch_axis
            self.calls = []
            self.target = replace(Target("cpu", "float32", given.batch or rows, given.compiled, 1), **target)
            self.made.append(self)

        def alone(self, seconds=1.0):
            self.calls.append("alone")
            return Times(((2 * dense,),))

        def compare(self, model, seconds=1.0):
            self.calls.append("compare")
            # The computer is slower in each round. In the last four rounds the ratio is another one.
            rounds = [(dense * (1 + i), pruned * (1 + i)) for i in range(6)]
            return Times((*rounds, *2 * [(dense, 2 * pruned)], *2 * [(dense, pruned / 2)]))

    return Fake
