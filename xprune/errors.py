"""The errors xprune raises: each names what was given, what is allowed and what to do next."""


class XPruneError(Exception):
    """Base of every error of this package."""


class ModelError(XPruneError):
    """The model cannot be pruned as it is: no sites, a wrapper, a forward that fails."""


class DataError(XPruneError):
    """The loader or its batches do not fit the task: empty, not (inputs, labels), labels out of range."""


class PluginError(XPruneError):
    """A criterion, selection or adapter that is unknown, or whose answer breaks its contract."""


class BudgetError(XPruneError):
    """A budget out of (0, 1], or below what is reachable."""


class PlanError(XPruneError):
    """A plan that is not well formed or does not fit the model."""


class GateError(XPruneError):
    """A gate that did not fire in a forward pass, or whose rows do not fit the layer's input."""


class SurgeryError(XPruneError):
    """The pruned model does not compute what the gated dense model computes."""


class TrainingError(XPruneError):
    """Training cannot go on: a loss that is not finite, a checkpoint of another run."""


class ArtefactError(XPruneError):
    """A saved model that is missing, truncated, foreign or tampered with."""
