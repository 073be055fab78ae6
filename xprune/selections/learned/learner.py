"""Trains the thresholds of `LearnedThresholds`: gradient steps towards a budget, with the weights frozen or not."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.interfaces import Context
from xprune.costs.expected import UnitCosts
from xprune.modules.undisturbed import seeded
from xprune.surgery.gates import Gated
from xprune.training.loop import Loop, Stateful, Weights
from xprune.training.optim import decayed
from xprune.training.runtime import accelerator

_RECORDS = 50
"""About how many records of a training the history keeps."""


@dataclass(frozen=True)
class ThresholdSettings:
    """Settings of the training of thresholds. They are fields of the selection: `LearnedThresholds` describes them."""

    weights: str | None = None
    steps: int | None = None
    lr: float = 0.02
    weights_lr: float = 3e-4
    slope: tuple[float, float] = (10.0, 50.0)
    anneal: float = 0.6
    penalty: float = 50.0


class History:
    """Records of a training as plain data, which a checkpoint can save.

    Attributes:
        records: One record for every few steps, see `_GateSource.state`.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the records, for a checkpoint."""
        return {"records": self.records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the records of a checkpoint."""
        self.records = list(state["records"])


class ThresholdLearner:
    """The training of one threshold for each site, on the ranks of its units.

    Args:
        context: The model, the data, the task, the seed and the checkpoint folder.
        ranks: For each site, the ranks of its units in (0, 1), (units,).
        costs: The costs of the units.
        budget: The budget to meet.
        settings: How the thresholds learn.
        start: Thresholds (points, sites) to start from: the first row at the dense model's cost, the last one at the
            budget.

    Attributes:
        history: Records of the training.
    """

    def __init__(
        self,
        context: Context,
        ranks: Sequence[Tensor],
        costs: Costs,
        budget: Budget,
        settings: ThresholdSettings,
        start: Tensor,
    ) -> None:
        self.context, self.sites, self.settings, self.history = context, costs.sites, settings, History()
        # Frozen weights get no gradient, which several processes have to look for.
        self.runner = accelerator(unused=True)
        self.source = _GateSource(ranks, UnitCosts.of(costs, budget, self.runner.device), settings, start)

    @property
    def thresholds(self) -> Tensor:
        """The threshold of each site at the budget, float32 (sites,). Units with lower ranks are removed."""
        return self.source.thresholds(1.0).detach().cpu()

    def run(self, steps: int, joint: bool) -> "ThresholdLearner":
        """Takes all steps. A run that was killed continues from its last checkpoint.

        Args:
            steps: The number of steps.
            joint: True: the weights of `context.model` are trained too. It must not share them with the caller's model.
                False: the weights do not change.

        Returns:
            The learner itself.
        """
        context, settings, model = self.context, self.settings, self.context.model
        with seeded(context.seed):
            loop = Loop(self.runner, context.task, context.data("learned"), "thresholds", steps, context.seed)
            gated = Gated(model, self.sites, self.source, context.task.forward, context.task.rows).to(
                self.runner.device
            )
            # A checkpoint of a run that started from other weights, ranks or thresholds must not be taken.
            start = Weights(model).digest() + Weights(self.source).digest()
            optimizers: list[torch.optim.Optimizer] = []
            optimizers.append(torch.optim.Adam([self.source.learned], lr=settings.lr))
            if joint:
                optimizers.append(torch.optim.AdamW(decayed(model, 0.05), lr=settings.weights_lr))
            self.model, *self.optimizers = self.runner.prepare(gated, *optimizers)
            parts: dict[str, Stateful] = {"thresholds": Weights(self.source), "history": self.history}
            parts |= {"model": Weights(model)} if joint else {}
            parts |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(self.optimizers)}
            fingerprint = {**asdict(settings), **self.source.costs.budget, "joint": joint, "start": start}
            loop.keep(context.checkpoint_dir, parts, **fingerprint)
            self.loop = loop
            # Frozen weights learn thresholds for the model as it will be used: without dropout.
            model.train(joint)
            with gated.gates.attached(model):
                loop.run(self._step)
            model.eval()
        return self

    def _step(self, inputs: Any, targets: Any) -> None:
        """Takes one step on the thresholds, and on the weights if these are trained too."""
        task, loop, settings = self.context.task, self.loop, self.settings
        progress = (loop.step + 1) / loop.steps
        first, last = settings.slope
        # The slope grows by the same factor at each step.
        slope = first * (last / first) ** progress
        # The first optimizer is that of the thresholds. Large steps while the target moves, small ones to settle.
        for group in self.optimizers[0].param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
        with self.runner.autocast():
            outputs = self.model(inputs, task.size(targets), slope, progress / settings.anneal)
        task.check(outputs, targets)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.loop.backward(task.loss(outputs, targets) + self.source.lagrangian())
        if len(self.optimizers) > 1:
            self.runner.clip_grad_norm_(self.context.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        excess = self.source.ascend()
        if loop.step % max(1, loop.steps // _RECORDS) == 0 or loop.step + 1 == loop.steps:
            self.history.records.append({"step": loop.step, "slope": slope, **self.source.state(excess)})


class _GateSource(nn.Module):
    """A module that computes the gates of each sample from the thresholds, and holds the multipliers of the budget.

    Names of buffers and parameters are those in checkpoints.

    Args:
        ranks: For each site, the ranks of its units, (units,).
        costs: The costs of the units, and the allowed cost.
        settings: How the thresholds learn.
        start: Thresholds (points, sites) to start from, from the dense model's cost to the budget.
    """

    def __init__(self, ranks: Sequence[Tensor], costs: UnitCosts, settings: ThresholdSettings, start: Tensor) -> None:
        super().__init__()
        device = costs.unit.device
        self.costs, self.penalty = costs, settings.penalty
        self.learned = nn.Parameter(torch.zeros(len(ranks), device=device))
        self.register_buffer("path", start.float().to(device), persistent=False)
        self.register_buffer("multipliers", torch.zeros(len(costs.allowed), device=device))
        self.register_buffer("ranks", torch.cat(list(ranks)).float().to(device), persistent=False)
        # The site of each unit, (units,).
        index = torch.arange(len(ranks), device=device)
        self.register_buffer("index", index.repeat_interleave(torch.tensor(costs.sizes, device=device)))
        # True for the best units of each site, as many as the budget says must stay, (units,).
        stays = torch.cat([(r.argsort(descending=True).argsort() < n) for r, n in zip(ranks, costs.least, strict=True)])
        self.register_buffer("stays", stays.to(device))

    def thresholds(self, progress: float) -> Tensor:
        """Returns the thresholds (sites,): the starting thresholds at this progress, plus the learned distances.

        Args:
            progress: The share of the annealing that is done. From 1 on, the target is the budget.
        """
        start = self.get_buffer("path")
        point = round(min(progress, 1.0) * (len(start) - 1))
        return start[point] + self.learned

    def forward(self, samples: int, slope: float, progress: float) -> Tensor:
        """Draws the gates of one batch.

        A gate is 1 if rank > threshold + noise. The noise is logistic, so a gate is 1 with the probability
        (1 + tanh(slope (rank - threshold))) / 2. The gradient is that of this probability. All units of a site have the
        same noise, so each sample sees the site with its best units up to some number, as a plan would keep them.

        Args:
            samples: The number of samples.
            slope: The slope of the smooth step.
            progress: The share of the annealing that is done.

        Returns:
            Gates (samples, units) of 0 and 1.
        """
        thresholds, index = self.thresholds(progress), self.get_buffer("index")
        margin = self.get_buffer("ranks") - thresholds[index]  # (units,)
        # sigmoid(2x) = (1 + tanh(x)) / 2.
        soft = torch.sigmoid(2 * slope * margin).masked_fill(self.get_buffer("stays"), 1.0)
        self._excess = self.costs.excess(soft[None], progress)[0]
        self._rates, self._thresholds = soft.detach(), thresholds.detach()
        # (samples, sites). The logit of a uniform number is logistic, and infinite at 0 and 1.
        noise = torch.rand(samples, len(thresholds), device=soft.device).clamp(1e-6, 1 - 1e-6).logit() / (2 * slope)
        hard = ((margin.detach() > noise[:, index]) | self.get_buffer("stays")).to(soft.dtype)
        # The value is that of the hard gates, and the gradient that of the smooth step.
        return hard + soft - soft.detach()

    def lagrangian(self) -> Tensor:
        """Returns penalty / 2 * (R - target)^2 + multiplier * (R - target), for the thresholds of the last batch.

        It is the sum over all limits of the budget. R is the expected cost as a share of the dense model's cost.
        """
        return (self.penalty / 2 * self._excess.square() + self.get_buffer("multipliers") * self._excess).sum()

    @torch.no_grad()
    def ascend(self) -> Tensor:
        """Changes each multiplier in proportion to penalty times excess: up if the cost is above the target, else down.

        The multiplier has to ascend. Public attempts at the paper descend on it too, which has no minimum.

        Returns:
            The excess (limits,): the expected cost less the target, as shares of the dense model's cost.
        """
        self.get_buffer("multipliers").add_(_PACE * self.penalty * self._excess.detach())
        return self._excess.detach()

    def state(self, excess: Tensor) -> dict[str, Any]:
        """Returns a record of the last batch as plain data.

        Args:
            excess: The excess (limits,), as `ascend` returns it.

        Returns:
            "rates": the expected share of units that each site keeps. "thresholds": one for each site. "excess" and
            "multipliers": one for each limit of the budget.
        """
        rates = [float(part.mean()) for part in self._rates.split(list(self.costs.sizes))]
        return {
            "rates": rates,
            "thresholds": self._thresholds.tolist(),
            "excess": excess.tolist(),
            "multipliers": self.get_buffer("multipliers").tolist(),
        }


_PACE = 0.1
"""How far a multiplier moves at each step, as a factor on penalty times excess.

The method of multipliers has 1, but it finds a minimum before each step of the multiplier. We take a gradient step.
"""
