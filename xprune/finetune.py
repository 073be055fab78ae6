"""finetune: trains a pruned model, in one process or many, and resumes where it was killed."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xprune import checkpoint
from xprune.errors import DataError, TrainingError
from xprune.runtime import accelerator, batches, check_loader, prepared, reduced, seeded, warn_unless_ordered
from xprune.structure import Removed, alias, own, reference_device, tensors, unwrap
from xprune.task import Classification, Task


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


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    settings: Finetune | None = None,
    *,
    teacher: nn.Module | None = None,
    task: Task | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
) -> nn.Module:
    """A trained copy of the model, in eval mode and on the model's device; the model given is not changed.

    teacher          the dense model, needed where settings.distill > 0
    seed             of the order of batches, dropout and drop path; each epoch draws from seed and epoch alone
    checkpoint_dir   where the state is kept after each epoch; a run that was killed goes on from there to the same
                     result, and one that ended removes it

    Under several processes (`accelerate launch`, `torchrun`) a batch of the loader is the global batch and is split
    over them; a last batch that cannot be split is completed from the first. Raises TrainingError for a loss that is
    not finite, naming the step and the last good checkpoint, and DataError for a loader that does not fit.
    """
    settings, task = settings or Finetune(), task or Classification()
    check_loader(loader, task)
    if not hasattr(loader, "__len__"):
        raise DataError(
            "fine-tuning needs a loader with a length, for its learning-rate schedule; give a DataLoader or a list."
        )
    if settings.distill and teacher is None:
        raise TrainingError(
            f"Finetune(distill={settings.distill}) needs a teacher: give finetune(..., teacher=dense_model)."
        )
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
    model = unwrap(model)
    student = own(alias(model), model)
    unused = any(isinstance(part, Removed) for part in student.modules())  # nobody reads the norm in front of it
    runner = accelerator(settings.mixed_precision, even_batches=True, unused=unused)
    with seeded(seed):
        run = _Run(student.to(runner.device), runner, settings, task, loader, teacher, seed, folder)
        run.train()
    return run.result.to(reference_device(model)).eval()


class _Run:
    """One fine-tuning run: what it trains, and where it stands."""

    def __init__(
        self,
        student: nn.Module,
        runner: Accelerator,
        settings: Finetune,
        task: Task,
        loader: Any,
        teacher: nn.Module | None,
        seed: int,
        folder: Path | None,
    ) -> None:
        self.student, self.runner, self.settings, self.task = student, runner, settings, task
        self.seed, self.folder, self.epoch = seed, folder, 0
        self.teacher = alias(unwrap(teacher)).to(runner.device) if teacher is not None and settings.distill else None
        self.ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(settings.ema)) if settings.ema else None
        decayed = [p for p in student.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in student.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr)
        self.model, self.optimizer = runner.prepare(student, optimizer)
        self.loader = prepared(runner, loader)
        self.steps = len(loader) * settings.epochs
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        self.fingerprint = {**asdict(settings), "seed": seed, "steps": self.steps, "start": _digest(student)}
        if folder is not None:
            warn_unless_ordered(loader)
            self._resume(folder)

    @property
    def result(self) -> nn.Module:
        """The trained model: the moving average where there is one."""
        trained: nn.Module = (
            self.ema.module if self.ema else self.runner.unwrap_model(self.model, keep_fp32_wrapper=False)
        )
        vars(trained).pop("forward", None)  # Accelerate leaves a bound method, which a deep copy would share
        return trained

    def train(self) -> None:
        """Runs the epochs that are left."""
        for epoch in range(self.epoch, self.settings.epochs):
            torch.manual_seed(self.seed * 100_003 + epoch + 7919 * self.runner.process_index)
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(epoch)
            self.model.train()
            for inputs, targets in batches(
                self.runner, self.loader, self.task, f"epoch {epoch + 1}/{self.settings.epochs}"
            ):
                self._step(inputs, targets)
            self.epoch = epoch + 1
            if self.folder is not None and self.runner.is_main_process:
                checkpoint.write(self.folder, self._state(), self.fingerprint)
        if self.folder is not None and self.runner.is_main_process:
            checkpoint.clear(self.folder)

    def _step(self, inputs: Any, targets: Any) -> None:
        with self.runner.autocast():
            outputs = self.task.forward(self.model, inputs)
        self.task.check(outputs, targets)
        loss = self.task.loss(outputs, targets, self.settings.label_smoothing)
        if self.teacher is not None:
            with torch.no_grad(), self.runner.autocast():
                wanted = self.task.forward(self.teacher, inputs)
            share = self.settings.distill
            loss = (1 - share) * loss + share * self.task.distillation(outputs, wanted, self.settings.temperature)
        self._stop_unless_finite(loss)
        self.optimizer.zero_grad(set_to_none=True)
        self.runner.backward(loss)
        if self.settings.clip is not None:
            self.runner.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.ema:
            self.ema.update_parameters(self.student)

    def _stop_unless_finite(self, loss: Tensor) -> None:
        finite = torch.isfinite(reduced(self.runner, loss.detach().float()))  # every process stops, not one alone
        if not bool(finite):
            kept = f"the last good checkpoint is of epoch {self.epoch} in {self.folder}"
            if not self.folder or not self.epoch:
                kept = "there is no checkpoint"
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.schedule.last_epoch} of {self.steps} "
                f"(epoch {self.epoch + 1}); {kept}. Lower lr, clip gradients, or look at the batch for NaN."
            )

    def _rate(self, step: int) -> float:
        """Factor on the peak learning rate: linear warm-up, then half a cosine to 0."""
        warm = int(self.settings.warmup * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def _state(self) -> dict[str, Any]:
        state = {
            "epoch": self.epoch,
            "model": tensors(self.student),
            "optimizer": self.optimizer.state_dict(),
        }
        state["schedule"] = {"last_epoch": self.schedule.last_epoch}
        state["ema"] = self.ema.state_dict() if self.ema else {}
        state["scaler"] = self.runner.scaler.state_dict() if self.runner.scaler else {}
        return state

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read(folder, self.fingerprint)
        if state is None:
            return
        with torch.no_grad():
            for name, tensor in tensors(self.student).items():
                tensor.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.runner.scaler:
            self.runner.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]


def _digest(model: nn.Module) -> str:
    """A short name for the weights at the start, so that another model's checkpoint is not taken for this one's."""
    digest = hashlib.sha256()
    for name, tensor in tensors(model).items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.double().sum().item():.6e}".encode())
    return digest.hexdigest()[:16]
