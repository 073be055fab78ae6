"""Learned thresholds: `selection` is the plug-in, `learner` takes its gradient steps."""

from xprune.selections.learned.selection import LearnedThresholds

__all__ = ["LearnedThresholds"]
