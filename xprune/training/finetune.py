"""finetune: trains a pruned model, in one process or many, and resumes where it was killed."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xprune.core.task import Task
from xprune.errors import TrainingError
from xprune.modules.copies import reference_device, shared_copy, unshare, unwrap
from xprune.modules.removed import Removed
from xprune.modules.undisturbed import seeded
from xprune.tasks.classification import Classification
from xprune.training.loop import Loop, Stateful, Weights, length
from xprune.training.optim import Position, cosine, decayed
from xprune.training.runtime import accelerator, check_loader, stage


@dataclass(frozen=True)
class Finetune:
    """Settings of fine-tuning: AdamW, cosine decay after a linear warm-up.

    epochs            passes over the training loader
    lr                peak learning rate
    weight_decay      on weights of two axes and more; none on biases, norms and tables of one axis
    warmup            fraction of all steps
    label_smoothing   of the task's loss
    clip              largest norm of the gradient, None for none
    mixed_precision   "no", "fp16", "bf16"; None: as `accelerate launch` was told
    distill           weight of the divergence from the dense model's outputs against the task's loss, 0 to 1
    temperature       of that divergence
    ema               decay of an exponential moving average of the weights, which is then returned; None for none
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
        }
        for name in (name for name, fine in checks.items() if not fine):
            raise TrainingError(
                f"Finetune({name}={getattr(self, name)!r}) is out of range; see the docstring of Finetune."
            )


@stage()
def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    settings: Finetune | None = None,
    *,
    teacher: nn.Module | None = None,
    task: Task | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    taken: int = 0,
    what: str = "fine-tuning",
) -> nn.Module:
    """A trained copy of the model, in eval mode and on the model's device; the model given is not changed.

    Args:
        model: What to train.
        loader: Training batches, with a length.
        settings: None: `Finetune()`.
        teacher: The dense model, needed where settings.distill > 0.
        task: How to read a batch, and the loss. None: classification of (inputs, labels).
        seed: Of the order of batches, dropout and drop path.
        checkpoint_dir: Where the state is kept, after each epoch and every five minutes in between. A run that was
            killed goes on from there to the same result. One that ended removes it.
        taken: Updates that the weights have had already, while thresholds learned. As many less are taken here.
        what: Names the training in the progress bar and in errors.

    Under several processes (`accelerate launch`, `torchrun`) a batch of the loader is the global batch and is split
    over them; a last batch that cannot be split is completed from the first. Raises TrainingError for a loss that is
    not finite, naming the step and the last good checkpoint, and DataError for a loader that does not fit.
    """
    settings, task = settings or Finetune(), task or Classification()
    check_loader(loader)
    steps = max(settings.epochs * length(loader, what) - taken, 0)
    if settings.distill and teacher is None:
        raise TrainingError(
            f"Finetune(distill={settings.distill}) needs a teacher: give finetune(..., teacher=dense_model)."
        )
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
    model = unwrap(model)
    student = unshare(shared_copy(model), model)
    unused = any(isinstance(part, Removed) for part in student.modules())  # nobody reads the norm in front of it
    runner = accelerator(settings.mixed_precision, even_batches=True, unused=unused)
    with seeded(seed):
        loop = Loop(runner, task, loader, what, steps, seed)
        run = _Run(student.to(runner.device), settings, loop, teacher, folder)
        loop.run(run.step)
    return run.result.to(reference_device(model)).eval()


class _Run:
    """One fine-tuning run: what it trains, and how a step goes."""

    def __init__(
        self, student: nn.Module, settings: Finetune, loop: Loop, teacher: nn.Module | None, folder: Path | None
    ) -> None:
        self.student, self.settings, self.loop, self.runner = student, settings, loop, loop.runner
        self.teacher = (
            shared_copy(unwrap(teacher)).to(self.runner.device) if teacher is not None and settings.distill else None
        )
        self.ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(settings.ema)) if settings.ema else None
        optimizer = torch.optim.AdamW(decayed(student, settings.weight_decay), lr=settings.lr)
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
        loop.keep(folder, parts, **asdict(settings), start=start)
        self.model.train()

    @property
    def result(self) -> nn.Module:
        """The trained model: the moving average where there is one."""
        trained: nn.Module = (
            self.ema.module if self.ema else self.runner.unwrap_model(self.model, keep_fp32_wrapper=False)
        )
        vars(trained).pop("forward", None)  # Accelerate leaves a bound method, which a deep copy would share
        return trained

    def step(self, inputs: Any, targets: Any) -> None:
        """One update of the weights."""
        task, share = self.loop.task, self.settings.distill
        with self.runner.autocast():
            outputs = task.forward(self.model, inputs)
        task.check(outputs, targets)
        loss = task.loss(outputs, targets, self.settings.label_smoothing)
        if self.teacher is not None:
            with torch.no_grad(), self.runner.autocast():
                wanted = task.forward(self.teacher, inputs)
            loss = (1 - share) * loss + share * task.distillation(outputs, wanted, self.settings.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        self.loop.backward(loss)
        if self.settings.clip is not None:
            self.runner.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.ema:
            self.ema.update_parameters(self.student)
