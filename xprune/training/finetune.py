"""finetune: trains a pruned model, in one process or several. A run that was killed can be resumed."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xprune.core.checkpoint import Checkpoint
from xprune.core.task import Task, check_distillation
from xprune.errors import TrainingError
from xprune.modules.copies import reference_device, shared_copy, unshare, unwrap
from xprune.modules.digest import OPTIONAL
from xprune.modules.recompute import recomputed
from xprune.modules.refused import TRAIN, refuse, refuse_frozen
from xprune.modules.removed import Removed
from xprune.modules.undisturbed import seeded
from xprune.tasks.classification import Classification
from xprune.training.loop import Loop, Stateful, Weights, length, updates_of
from xprune.training.master import Dtypes, narrow, precision_for, widen, widened
from xprune.training.optim import Position, cosine, decayed
from xprune.training.runtime import accelerator, check_loader, stage
from xprune.training.sharding import refuse_sharding


@dataclass(frozen=True)
class Finetune:
    """Settings of fine-tuning. The optimizer is AdamW. The learning rate rises linearly, then falls as a cosine to 0.

    Args:
        epochs: The number of epochs over the training loader, at least 1.
        lr: The largest learning rate, more than 0.
        weight_decay: The weight decay of parameters with two or more axes. Parameters with one axis, such as biases and
            the weights of norm layers, have no weight decay.
        warmup: The length of the linear rise, as a fraction of all steps, from 0 to less than 1.
        label_smoothing: The label smoothing of the task's loss, from 0 to less than 1.
        clip: The gradient is clipped to this L2 norm, more than 0. If None, it is not clipped.
        mixed_precision: "no", "fp16" or "bf16". If None, the setting of `accelerate launch` is used. Without
            `accelerate launch`, None means "no" for a float32 model. A bfloat16 model computes in bfloat16, and a
            float16 model in float16 on a GPU. In all cases, the weights are float32 while they are trained, see
            `xprune.training.master`.
        distill: The weight of distillation, from 0 to 1. The loss is (1 - distill) times the loss of the task, plus
            distill times the divergence from the outputs of the dense model, see `Task.distillation`.
        temperature: The temperature of the divergence, more than 0.
        ema: The decay of an exponential moving average of the weights, between 0 and 1. If it is given, `finetune`
            returns the averaged weights. If None, `finetune` returns the weights after the last step.
        accumulate: The number of batches for one update of the weights, at least 1. Their gradients are added up, so
            the update is that of one large batch, with the memory of a small one. Batches with fewer samples weigh
            less. The last update of an epoch has the batches that are left.
        layer_decay: The factor by which the learning rate falls from each layer to the layer before it, more than 0, at
            most 1. The head learns with `lr`, and the embedding slowest. See `xprune.training.optim.layer_scales`. If
            None, all layers learn with `lr`.
        recompute_activations: If True, the backward pass computes the activations of each block again, instead of
            storing them. This is activation checkpointing: it needs less memory and more time, and the weights are
            the same. If False, all activations are stored.
        steps: The number of updates of the weights, at least 1. The loader is read as often as this needs, and `epochs`
            is ignored. It is needed for a loader without a length, such as a stream of data. If None, the number
            follows from `epochs`, the number of batches and `accumulate`.

    Raises:
        TrainingError: A value is out of range.

    Example:
        >>> import xprune
        >>> model, loader = nn.Linear(4, 3), [(torch.randn(8, 4), torch.arange(8) % 3)]
        >>> tuned = xprune.finetune(model, loader, Finetune(epochs=10, lr=0.01))
        >>> xprune.evaluate(tuned, loader).loss < xprune.evaluate(model, loader).loss
        True
    """

    epochs: int = 5
    lr: float = 2e-4
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.0
    clip: float | None = 1.0
    mixed_precision: str | None = None
    distill: float = 0.0
    temperature: float = 1.0
    ema: float | None = None
    steps: int | None = None
    accumulate: int = field(default=1, metadata=OPTIONAL)
    layer_decay: float | None = field(default=None, metadata=OPTIONAL)
    recompute_activations: bool = field(default=False, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        checks = {
            "epochs": self.epochs >= 1,
            "lr": self.lr > 0,
            "warmup": 0 <= self.warmup < 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "clip": self.clip is None or self.clip > 0,
            "mixed_precision": self.mixed_precision in (None, "no", "fp16", "bf16"),
            "distill": 0 <= self.distill <= 1,
            "temperature": self.temperature > 0,
            "ema": self.ema is None or 0 < self.ema < 1,
            "steps": self.steps is None or self.steps >= 1,
            "accumulate": self.accumulate >= 1,
            "layer_decay": self.layer_decay is None or 0 < self.layer_decay <= 1,
        }
        for name in (name for name, fine in checks.items() if not fine):
            raise TrainingError(
                f"Finetune({name}={getattr(self, name)!r}) is out of range. help(xprune.Finetune) says what is allowed."
            )

    def updates(self, loader: Iterable[Any], what: str = "fine-tuning") -> int:
        """Returns how many updates of the weights fine-tuning makes: one for `accumulate` batches, or `steps`.

        Args:
            loader: The training batches.
            what: The name of the training, for the error.

        Raises:
            DataError: The loader is empty, or it has no length and `steps` is None.
        """
        if self.steps is not None:
            return self.steps
        return self.epochs * updates_of(length(loader, what), self.accumulate)


@stage()
def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    settings: Finetune | None = None,
    *,
    teacher: nn.Module | None = None,
    task: Task | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | Checkpoint | None = None,
    taken: int = 0,
    what: str = "fine-tuning",
) -> nn.Module:
    """Trains a copy of a model, such as a pruned model that has to regain accuracy.

    With several processes (`accelerate launch`, `torchrun`), each batch of the loader is split over the processes. If
    the last batch cannot be split evenly, samples of the first batch are added to it.

    Args:
        model: The model to train. It is not changed.
        loader: The training batches: a DataLoader, or a list of batches. If it has no length, give
            `Finetune(steps=...)`.
        settings: The settings. If None, `Finetune()` is used.
        teacher: The dense model. It is needed if `settings.distill` is more than 0. It is not changed.
        task: The task. It says how a batch is read and what the loss is. If None, it is `Classification()`, with
            batches (inputs, labels).
        seed: The seed for the order of batches, dropout and drop path.
        checkpoint_dir: A folder for the state of the run, which is written every ten minutes. With
            `xprune.Checkpoint`, it is written more or less often. If the run is killed, the same call continues from
            there, and ends with the same weights as without the interruption. A run that ends removes its checkpoint.
            If None, nothing is written.
        taken: The number of updates that the weights have had already, for example in the selection `learned`. The
            training is shorter by this number of steps.
        what: The name of the training in the progress bar and in errors.

    Returns:
        The trained copy, in eval mode and on the device of `model`. Each tensor has the dtype that it has in `model`.
        Half-precision weights are trained in float32, and rounded after the last step.

    Raises:
        TrainingError: The loss is not finite. The message names the step and the last checkpoint. Or a teacher is
            missing. Or a checkpoint is damaged or belongs to another run.
        DataError: The loader is empty, does not fit the task, or has no length and `settings.steps` is None. Or
            `settings.distill` is more than 0, and the task has no distillation.
        ModelError: All weights are frozen, or a part of the model cannot be trained, such as a quantised layer. Or
            `layer_decay` or `recompute_activations` is given, and no part of the model repeats.

    Example:
        >>> loader = [(torch.randn(8, 4), torch.arange(8) % 3)]
        >>> dense = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> pruned = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
        >>> tuned = finetune(pruned, loader, Finetune(epochs=2, distill=0.5), teacher=dense)
        >>> tuned.training
        False
    """
    settings, task = settings or Finetune(), task or Classification()
    check_loader(loader)
    model = unwrap(model)
    refuse(model, TRAIN)
    refuse_frozen(model)
    steps = max(settings.updates(loader, what) - taken, 0)
    if settings.distill and teacher is None:
        raise TrainingError(
            f"Finetune(distill={settings.distill}) needs a teacher: give finetune(..., teacher=dense_model)."
        )
    if settings.distill:
        check_distillation(task)
    student = unshare(shared_copy(model), model)
    # If a whole attention or MLP was removed, no layer reads the output of the norm layer in front of it. The weights
    # of this norm layer get no gradient, and DistributedDataParallel has to know that some weights get none.
    unused = any(isinstance(part, Removed) for part in student.modules())
    dtypes = widen(student)
    precision = precision_for(dtypes, settings.mixed_precision, accelerator().device)
    runner = accelerator(precision, even_batches=True, unused=unused)
    # In our tests, two processes with sharded weights ended with other weights than one process.
    refuse_sharding(runner, "Fine-tuning", "Train without FSDP, for example with DistributedDataParallel.")
    with seeded(seed):
        loop = Loop(runner, task, loader, what, steps, seed, settings.accumulate)
        run = _Run(student.to(runner.device), settings, loop, teacher, Checkpoint.of(checkpoint_dir), dtypes)
        with recomputed(student, settings.recompute_activations):
            loop.run(run.step, run.model)
    return narrow(run.result.to(reference_device(model)), dtypes).eval()


class _Run:
    """One run of fine-tuning: its student, teacher, optimizer and schedule of the learning rate.

    Args:
        student: The model to train. It is changed.
        settings: The settings.
        loop: The loop that calls `step`.
        teacher: The dense model, or None.
        where: The folder for checkpoints, and how often they are written. If None, no checkpoint is written.
        dtypes: The half-precision dtypes that the tensors of the student had before they were converted to float32, by
            name.
    """

    def __init__(
        self,
        student: nn.Module,
        settings: Finetune,
        loop: Loop,
        teacher: nn.Module | None,
        where: Checkpoint | None,
        dtypes: Dtypes,
    ) -> None:
        self.dtypes = dtypes
        self.student, self.settings, self.loop, self.runner = student, settings, loop, loop.runner
        self.teacher = (
            shared_copy(unwrap(teacher)).to(self.runner.device) if teacher is not None and settings.distill else None
        )
        self.ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(settings.ema)) if settings.ema else None
        optimizer = torch.optim.AdamW(
            decayed(student, settings.weight_decay, settings.lr, settings.layer_decay), lr=settings.lr
        )
        # This hash identifies the weights at the start of the run. It is computed before a checkpoint is loaded.
        start = Weights(student).digest()
        self.model, self.optimizer = self.runner.prepare(student, optimizer)
        self.schedule = cosine(optimizer, loop.steps, settings.warmup)
        parts: dict[str, Stateful] = {
            "model": Weights(student),
            "optimizer": self.optimizer,
            "schedule": Position(self.schedule),
        }
        if self.ema:
            parts["ema"] = self.ema
        if self.runner.scaler:
            parts["scaler"] = self.runner.scaler
        # The precision of a half-precision model depends on the device. So a run must not continue on another device.
        precision = {"precision": str(self.runner.mixed_precision)} if dtypes else {}
        loop.keep(where, parts, **asdict(settings), **precision, start=start)
        self.model.train()

    @property
    def result(self) -> nn.Module:
        """The trained model. If `settings.ema` is given, it has the moving average of the weights."""
        trained: nn.Module = (
            self.ema.module if self.ema else self.runner.unwrap_model(self.model, keep_fp32_wrapper=False)
        )
        # Accelerate leaves a bound method `forward` on the model. In a deep copy of the model, it would still run the
        # original model.
        vars(trained).pop("forward", None)
        return trained

    def step(self, inputs: Any, targets: Any) -> None:
        """Computes the gradients of a batch, and updates the weights after the last batch of an update."""
        task, share = self.loop.task, self.settings.distill
        with self.runner.autocast():
            outputs = task.forward(self.model, widened(inputs) if self.dtypes else inputs)
        self.loop.check(outputs, targets)
        loss = task.loss(outputs, targets, self.settings.label_smoothing)
        if self.teacher is not None:
            # The teacher keeps its dtype, which saves memory. So it gets the inputs as the loader gives them.
            with torch.no_grad(), self.runner.autocast():
                wanted = widened(task.forward(self.teacher, inputs))
            loss = (1 - share) * loss + share * task.distillation(outputs, wanted, self.settings.temperature)
        if self.loop.first:
            self.optimizer.zero_grad(set_to_none=True)
        self.loop.backward(loss)
        if not self.loop.last:
            return
        if self.settings.clip is not None:
            self.runner.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.ema:
            self.ema.update_parameters(self.student)
