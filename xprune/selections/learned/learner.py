"""ThresholdLearner: gradient steps on a threshold per site, with or without the weights, towards a budget."""

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


@dataclass(frozen=True)
class ThresholdSettings:
    """How thresholds learn; the fields are those of the selection that owns them, see `LearnedThresholds`."""

    weights: str | None = None
    steps: int | None = None
    lr: float = 0.02
    weights_lr: float = 3e-4
    slope: tuple[float, float] = (10.0, 50.0)
    anneal: float = 0.6
    penalty: float = 50.0


class History:
    """What is kept of a run, as plain data: one record now and then."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The records."""
        return {"records": self.records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from these records."""
        self.records = list(state["records"])


class ThresholdLearner:
    """Learns one threshold per site on the ranks of scores.

    path     thresholds (points, sites) to start from at each share of the way to the budget, from 0 to 1
    steps    to take
    joint    the weights of `context.model`, which is then a copy of the caller's own, learn along
    """

    def __init__(
        self,
        context: Context,
        ranks: Sequence[Tensor],
        costs: Costs,
        budget: Budget,
        settings: ThresholdSettings,
        path: Tensor,
    ) -> None:
        self.context, self.sites, self.settings, self.history = context, costs.sites, settings, History()
        self.runner = accelerator(unused=True)
        self.source = _Source(ranks, UnitCosts.of(costs, budget, self.runner.device), settings, path)

    @property
    def thresholds(self) -> Tensor:
        """What each site's ranks have to exceed, float32 (sites,)."""
        return self.source.thresholds(1.0).detach().cpu()

    def run(self, steps: int, joint: bool) -> "ThresholdLearner":
        """Takes the steps; a run that was killed goes on where its state was last kept."""
        context, settings, model = self.context, self.settings, self.context.model
        with seeded(context.seed):
            loop = Loop(self.runner, context.task, context.data("learned"), "thresholds", steps, context.seed)
            gated = Gated(model, self.sites, self.source, context.task.forward, context.task.rows).to(
                self.runner.device
            )
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
            model.train(joint)
            with gated.gates.attached(model):
                loop.run(self._step)
            model.eval()
        return self

    def _step(self, inputs: Any, targets: Any) -> None:
        task, loop, settings = self.context.task, self.loop, self.settings
        progress = (loop.step + 1) / loop.steps
        slope = settings.slope[0] * (settings.slope[1] / settings.slope[0]) ** progress
        for group in self.optimizers[0].param_groups:  # large steps while the target moves, small ones to settle
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


class _Source(nn.Module):
    """Gates of each sample, from the thresholds, the slope and chance."""

    def __init__(self, ranks: Sequence[Tensor], costs: UnitCosts, settings: ThresholdSettings, path: Tensor) -> None:
        super().__init__()
        device = costs.unit.device
        self.costs, self.penalty = costs, settings.penalty
        self.learned = nn.Parameter(torch.zeros(len(ranks), device=device))
        self.register_buffer("path", path.float().to(device), persistent=False)
        self.register_buffer("multipliers", torch.zeros(len(costs.allowed), device=device))
        self.register_buffer("ranks", torch.cat(list(ranks)).float().to(device), persistent=False)
        index = torch.arange(len(ranks), device=device)
        self.register_buffer("index", index.repeat_interleave(torch.tensor(costs.sizes, device=device)))
        stays = torch.cat([(r.argsort(descending=True).argsort() < n) for r, n in zip(ranks, costs.least, strict=True)])
        self.register_buffer("stays", stays.to(device))

    def thresholds(self, progress: float) -> Tensor:
        """(sites,): where the path is by now, and what was learned to add to it."""
        path = self.get_buffer("path")
        return path[round(min(progress, 1.0) * (len(path) - 1))] + self.learned

    def forward(self, samples: int, slope: float, progress: float) -> Tensor:
        """(samples, units) of 0 and 1: rank > threshold + noise, the gradient of (1 + tanh(slope (rank - it))) / 2.

        The noise is logistic, so that its mean is that tanh form, and one for all units of a site, so that what a
        sample sees is one number of units that a plan could keep.
        """
        thresholds, index = self.thresholds(progress), self.get_buffer("index")
        margin = self.get_buffer("ranks") - thresholds[index]  # (units,)
        soft = torch.sigmoid(2 * slope * margin).masked_fill(self.get_buffer("stays"), 1.0)
        self._excess = self.costs.excess(soft[None], progress)[0]
        self._rates, self._thresholds = soft.detach(), thresholds.detach()
        noise = torch.rand(samples, len(thresholds), device=soft.device).clamp(1e-6, 1 - 1e-6).logit() / (2 * slope)
        hard = ((margin.detach() > noise[:, index]) | self.get_buffer("stays")).to(soft.dtype)
        return hard + soft - soft.detach()

    def lagrangian(self) -> Tensor:
        """penalty / 2 (R - target)^2 + multiplier (R - target), summed over limits, for the last batch's thresholds."""
        return (self.penalty / 2 * self._excess.square() + self.get_buffer("multipliers") * self._excess).sum()

    @torch.no_grad()
    def ascend(self) -> Tensor:
        """Raises each multiplier by penalty x excess, and returns the excess (limits,).

        Ascent is the point: descending on the multiplier too, as the public attempts at the paper do, has no minimum.
        """
        self.get_buffer("multipliers").add_(_PACE * self.penalty * self._excess.detach())
        return self._excess.detach()

    def state(self, excess: Tensor) -> dict[str, Any]:
        """Rate per site, thresholds, excess of the cost over its target, multipliers."""
        rates = [float(part.mean()) for part in self._rates.split(list(self.costs.sizes))]
        return {
            "rates": rates,
            "thresholds": self._thresholds.tolist(),
            "excess": excess.tolist(),
            "multipliers": self.get_buffer("multipliers").tolist(),
        }


_PACE = 0.1  # of the ascent, in penalties a step: the method of multipliers' 1 is for steps that end in a minimum
