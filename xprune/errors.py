"""The errors that xprune raises. Each message says what was given, what is allowed and what to do next.

All of them inherit from `XPruneError`. To handle all of them in one place, catch `XPruneError`.
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
        - The model has no sites of the unit kinds in `units=`, a pattern in `exclude=` matches no site, or a pattern in
          `inside=` matches no module.
        - PEFT or FSDP has wrapped the model.
        - The model is on the meta device, or a parameter is not initialised yet.
        - A plot, a report or an ONNX file needs an optional package that is not installed.

    What to do: check that `model(inputs)` runs with the same inputs, take the model out of its wrapper, and read
    `find_sites(...).left` for the reason why a module gave no site.
    """


class DataError(XPruneError):
    """The loader or its batches do not fit the task.

    Usual causes:
        - The loader is missing, empty, or an iterator that can be read only once.
        - A batch is neither (inputs, labels) nor a mapping with "labels".
        - Labels are out of range, or their shape does not fit the outputs.
        - The inputs do not have their samples along the axis that the task expects.
        - The command line was given a folder of images with a structure that it does not know.

    What to do: give a `torch.utils.data.DataLoader` or a list of batches. Also give a `task=` that can read the
    batches, such as `xprune.LanguageModel()` or a subclass of `xprune.Task`.
    """


class PluginError(XPruneError):
    """A criterion, selection, task, adapter, unit kind or resource is unknown, or breaks the rules of its base class.

    Usual causes:
        - A name or a setting is misspelt. The message lists the known ones.
        - A plug-in of another package cannot be imported, or has the same name as another plug-in.
        - A criterion returns scores that are not finite, or whose shapes do not fit the sites.
        - A selection returns a plan that costs more than the budget allows.

    What to do: correct the name. Test your own plug-in with `xprune.testing.check_criterion`, `check_selection` or
    `check_adapter`.
    """


class BudgetError(XPruneError):
    """The budget is not valid, or no plan can meet it.

    Usual causes:
        - A fraction is not in (0, 1], or no resource is limited at all.
        - The fraction is below that of the smallest model that can be reached. The message says the smallest possible
          fraction.
        - The budget limits a resource whose cost was not measured.

    What to do: ask for a larger fraction, lower `min_units` or `round_to`, or add unit kinds with
    `find_sites(..., units=[...])` so that more can be removed.
    """


class TargetError(XPruneError):
    """The target of a latency cannot be used.

    Usual causes:
        - This computer does not have the device, or torch was built without it.
        - The model does not run in the dtype of the target, or cannot be compiled.
        - A latency table is damaged, or was measured with another model.

    What to do: give a `Target` that this computer has. For the latency on another computer, measure a table there with
    `xprune profile`, and give `Target(table="FILE")` here.
    """


class PlanError(XPruneError):
    """A plan or a site contains wrong values, or does not fit the model.

    Usual causes:
        - The plan was made for another model, or the model was pruned since then.
        - Kept units are out of range, unsorted or given twice.
        - A site names an adapter or a unit kind that is not known here.

    What to do: apply the plan to the architecture that `find_sites` was called with, and install the package that adds
    the adapter or unit kind. To join two plans that follow each other, use `Plan.then`.
    """


class GateError(XPruneError):
    """A gate cannot act on its units in a forward pass.

    Usual causes:
        - The forward does not call the layer that reads the units, so its input was not gated.
        - xprune does not know which rows of a layer's input belong to which sample.
        - The shape of the gates is neither (units,) nor (samples, units).
        - The units pass through a norm layer of an unknown class.

    What to do: leave the site out with `find_sites(..., exclude=[...])`. If rows are the cause, give `batch_axis=` or
    implement `Task.rows`. If the forward does not call the layer, write an adapter with a `gated` class.
    """


class SurgeryError(XPruneError):
    """The proof failed: the pruned model does not compute what the gated dense model computes.

    The model that the caller gave is not changed.

    Usual causes:
        - An adapter or a unit kind lists a wrong cut, or a cut is missing. The message names the sites if they are
          known.
        - The outputs cannot be compared, because they contain NaN or because two calls with the same inputs give
          different outputs.
        - The forward of the pruned model fails, because it assumes the dense shapes.

    What to do: leave out the sites that the message names with `find_sites(..., exclude=[...])`. If you wrote the
    adapter, run `xprune.testing.check_adapter`.
    """


class TrainingError(XPruneError):
    """Training or scoring cannot go on.

    Usual causes:
        - The loss is not finite.
        - The checkpoint belongs to another run or another version, or it is damaged.
        - A setting of `Finetune` or of a selection is out of range.

    What to do: lower `lr`, and check the weights and the batches for NaN. If the checkpoint is the cause, give another
    `checkpoint_dir`, or delete the checkpoint to start again from the beginning.
    """


class ArtefactError(XPruneError):
    """A saved model or result cannot be written or read.

    Usual causes:
        - The folder does not exist, was not written by xprune, or its files are damaged or changed.
        - The folder to write to contains other files.
        - The artefact does not contain enough to rebuild the architecture.

    What to do: to load, give the folder that `save` wrote. To save, give a new folder. For a model that is neither from
    timm nor from transformers, give `load(..., model_fn=)`.
    """
