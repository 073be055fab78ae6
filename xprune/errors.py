"""The errors that xprune raises. Each message says what was given, what is allowed and what to do next.

All of them inherit from `XPruneError`. Catch it to handle every error of this package in one place.
"""


class XPruneError(Exception):
    """The base class of every error of this package.

    Example:
        >>> import xprune
        >>> try:
        ...     xprune.Budget(macs=2)
        ... except xprune.XPruneError as error:
        ...     print(type(error).__name__)
        BudgetError
    """


class ModelError(XPruneError):
    """The model cannot be pruned, measured or exported in its present form.

    Usual causes:
        - The forward fails on the example inputs, or it cannot be traced.
        - The model has no sites of the unit kinds that were asked for, or a pattern of `exclude=` matches no site.
        - The model is inside a wrapper: PEFT, or FSDP.
        - The model is on the meta device, or a parameter is not initialised yet.
        - An optional package is missing, for a plot, a report or an ONNX file.

    What to do: check that `model(inputs)` runs with the same inputs, take the model out of its wrapper, and read
    `find_sites(...).left` for the reason why a module gave no site.
    """


class DataError(XPruneError):
    """The loader or its batches do not fit the task.

    Usual causes:
        - The loader is missing, empty, or an iterator that can be read only once.
        - A batch is neither (inputs, labels) nor a mapping with "labels".
        - Labels are out of range, or of another shape than the outputs ask for.
        - The samples are not along the axis that the task expects.
        - A folder of images has another structure than the command line expects.

    What to do: give a `torch.utils.data.DataLoader` or a list of batches, and a `task=` that reads them, such as
    `xprune.LanguageModel()` or a subclass of `xprune.Task`.
    """


class PluginError(XPruneError):
    """A criterion, selection, adapter, unit kind or resource is unknown, or does not keep its contract.

    Usual causes:
        - A name or a setting is misspelt. The message lists those that are known.
        - A plug-in of another package cannot be imported, or takes a name that is taken.
        - A criterion gives scores that are not finite, or of another shape than the sites.
        - A selection gives a plan that costs more than the budget allows.

    What to do: correct the name. Test your own plug-in with `xprune.testing.check_criterion`, `check_selection` or
    `check_adapter`.
    """


class BudgetError(XPruneError):
    """The budget is not valid, or no plan can meet it.

    Usual causes:
        - A fraction is not in (0, 1], or no resource is limited at all.
        - The fraction is below the cost of the smallest model that can be reached. The message states that cost.
        - The cost of the resource was not measured.

    What to do: ask for a larger fraction, lower `min_units` or `round_to`, or add unit kinds with
    `find_sites(..., units=[...])` so that more can be removed.
    """


class PlanError(XPruneError):
    """A plan or a site is not well formed, or does not fit the model.

    Usual causes:
        - The plan was made for another model, or the model was pruned since then.
        - Kept units are out of range, unsorted or given twice.
        - A site names an adapter or a unit kind that is not known here.

    What to do: apply the plan to the architecture that `find_sites` looked at, and install the package that adds the
    adapter or unit kind. To join two plans that follow each other, use `Plan.then`.
    """


class GateError(XPruneError):
    """A gate cannot act on its units in a forward pass.

    Usual causes:
        - The forward does not call the layer that reads the units, so the gate did not fire.
        - It is not known which rows of a layer's input belong to which sample.
        - Gates have another shape than (units,) or (samples, units).
        - The units pass through a norm of an unknown class.

    What to do: leave the site out with `find_sites(..., exclude=[...])`. If rows are the cause, give `batch_axis=` or
    write `Task.rows`. If a class computes without its layers, write an adapter with a `gated` class.
    """


class SurgeryError(XPruneError):
    """The proof failed: the pruned model does not compute what the gated dense model computes.

    The model that was given is as it was before.

    Usual causes:
        - An adapter or a unit kind names wrong cuts, or leaves one out. The message names the sites if it can.
        - The outputs cannot be compared: they hold NaN, or they differ from call to call.
        - The forward of the pruned model fails, because it assumes the dense shapes.

    What to do: leave the sites that the message names out with `find_sites(..., exclude=[...])`. For an adapter of your
    own, run `xprune.testing.check_adapter`.
    """


class TrainingError(XPruneError):
    """Training or scoring cannot go on.

    Usual causes:
        - The loss is not finite.
        - The checkpoint is of another run, of another version, or damaged.
        - A setting of `Finetune` or of a selection is out of range.

    What to do: lower `lr`, and check weights and batches for NaN. Give another `checkpoint_dir`, or delete the old
    checkpoint to start anew.
    """


class ArtefactError(XPruneError):
    """A saved model or result cannot be written or read.

    Usual causes:
        - The folder is missing, truncated, changed since it was saved, or was not written by xprune.
        - The folder to write to holds other files.
        - The architecture cannot be rebuilt from what the artefact says.

    What to do: give the folder that `save` wrote, or a new folder to write to. For a model that is neither from timm
    nor from transformers, give `load(..., model_fn=)`.
    """
