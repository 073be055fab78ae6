"""Trains the thresholds of `LearnedThresholds` by gradient descent, so that the cost falls to the budget.

The weights of the model are trained too, or do not change.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.interfaces import Context
from xprune.costs.expected import UnitCosts
from xprune.modules.digest import OPTIONAL
from xprune.modules.undisturbed import seeded
from xprune.surgery.gates import Gated
from xprune.training.loop import Loop, Stateful, Weights
from xprune.training.optim import decayed
from xprune.training.runtime import accelerator
from xprune.training.sharding import average_gradients, refuse_sharding, shard

_RECORDS = 50
"""The approximate number of records that the history of a training contains."""


@dataclass(frozen=True)
class ThresholdSettings:
    """The settings of the training of thresholds. They are fields of `LearnedThresholds`, which describes them."""

    weights: str | None = None
    steps: int | None = None
    lr: float = 0.02
    weights_lr: float = 3e-4
    slope: tuple[float, float] = (10.0, 50.0)
    anneal: float = 0.6
    penalty: float = 50.0
    accumulate: int = field(default=1, metadata=OPTIONAL)


class History:
    """The records of a training, in a form that checkpoints can save.

    Attributes:
        records: One dict for every few steps, see `_GateSource.state`.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the records for a checkpoint."""
        return {"records": self.records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the records by those of a checkpoint. The training then adds new ones."""
        self.records = list(state["records"])


class ThresholdLearner:
    """The training of one threshold for each site. Thresholds are compared with the ranks of the units.

    Args:
        context: The context with the model, the data, the task, the seed and the checkpoint folder.
        ranks: For each site, a tensor (units,) with the ranks of its units, from 0 to 1. The unit with the highest
            score has the highest rank.
        costs: The costs of the units.
        budget: The budget that the thresholds have to meet at the end.
        settings: The settings of the training.
        start: A table (points, sites) of thresholds to start from. Its first row belongs to the cost of the dense
            model, and its last row to the budget.

    Attributes:
        history: The records of the training.
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
        # Weights that are not trained get no gradient. With several processes, torch has to know that.
        # The last batch of an epoch is split evenly, so that all processes make the same updates.
        self.runner = accelerator(even_batches=True, unused=True)
        self.source = _GateSource(ranks, UnitCosts.of(costs, budget, self.runner.device), settings, start)

    @property
    def thresholds(self) -> Tensor:
        """The threshold of each site for the budget, float32 (sites,).

        Units whose rank is below the threshold are removed. A rank is the place of a unit among the units of its site.
        The best unit has the highest rank.
        """
        return self.source.thresholds(1.0).detach().cpu()

    def run(self, steps: int, joint: bool) -> "ThresholdLearner":
        """Trains for all steps. If the program was killed, the training continues from its last checkpoint.

        Args:
            steps: The number of steps.
            joint: If True, the weights of `context.model` are trained too. They must not be shared with the caller's
                model. If False, the weights do not change.

        Returns:
            The learner itself.
        """
        context, settings, model = self.context, self.settings, self.context.model
        if joint:
            refuse_sharding(self.runner, "learned,weights=joint", "Give weights='frozen', or train without FSDP.")
        # The checkpoint contains this digest, so that a run with other weights, ranks or thresholds does not use the
        # checkpoint.
        start = Weights(model).digest()
        shard(self.runner, model, self.sites)
        with seeded(context.seed):
            data, accumulate = context.data("learned"), settings.accumulate
            loop = Loop(self.runner, context.task, data, "thresholds", steps, context.seed, accumulate)
            gated = Gated(model, self.sites, self.source, context.task.forward, context.task.rows)
            if not self.runner.is_fsdp2:
                gated = gated.to(self.runner.device)
            start += Weights(self.source).digest()
            optimizers: list[torch.optim.Optimizer] = []
            optimizers.append(torch.optim.Adam([self.source.learned], lr=settings.lr))
            if joint:
                optimizers.append(torch.optim.AdamW(decayed(model, 0.05), lr=settings.weights_lr))
            if self.runner.is_fsdp2:
                # The model is sharded already. Each process holds all thresholds, because they are few.
                self.model, self.optimizers = gated, [self.runner.prepare_optimizer(each) for each in optimizers]
            else:
                self.model, *self.optimizers = self.runner.prepare(gated, *optimizers)
            parts: dict[str, Stateful] = {"thresholds": Weights(self.source), "history": self.history}
            parts |= {"model": Weights(model)} if joint else {}
            parts |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(self.optimizers)}
            fingerprint = {**asdict(settings), **self.source.costs.budget, "joint": joint, "start": start}
            loop.keep(context.keeping, parts, **fingerprint)
            self.loop = loop
            # If the weights are not trained, the model is in eval mode, without dropout. This is how it will be used.
            model.train(joint)
            with gated.gates.attached(model):
                loop.run(self._step, None if self.runner.is_fsdp2 else self.model)
            model.eval()
        return self

    def _step(self, inputs: Any, targets: Any) -> None:
        """Trains the thresholds with one batch of an update, and the weights if these are trained too."""
        task, loop, settings = self.context.task, self.loop, self.settings
        progress = (loop.step + 1) / loop.steps
        first, last = settings.slope
        # The slope grows by the same factor at each step.
        slope = first * (last / first) ** progress
        # The first optimizer is that of the thresholds. Its learning rate is large while the target cost falls, and
        # small at the end.
        for group in self.optimizers[0].param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
        with self.runner.autocast():
            outputs = self.model(inputs, task.size(targets), slope, progress / settings.anneal)
        loop.check(outputs, targets)
        if loop.first:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
        self.loop.backward(task.loss(outputs, targets) + self.source.lagrangian())
        if not loop.last:
            return
        average_gradients(self.runner, self.source.parameters())
        if len(self.optimizers) > 1:
            self.runner.clip_grad_norm_(self.context.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        excess = self.source.ascend()
        if loop.step % max(1, loop.steps // _RECORDS) == 0 or loop.step + 1 == loop.steps:
            self.history.records.append({"step": loop.step, "slope": slope, **self.source.state(excess)})


class _GateSource(nn.Module):
    """A module that computes the gates of each sample from the thresholds, and makes the cost meet the budget.

    It holds one Lagrange multiplier for each limit of the budget. Checkpoints contain the names of its parameters and
    buffers, so these must not be renamed.

    Args:
        ranks: For each site, a tensor (units,) with the ranks of its units.
        costs: The costs of the units, and the allowed cost.
        settings: The settings of the training.
        start: A table (points, sites) of thresholds to start from, see `ThresholdLearner`.
    """

    def __init__(self, ranks: Sequence[Tensor], costs: UnitCosts, settings: ThresholdSettings, start: Tensor) -> None:
        super().__init__()
        device = costs.unit.device
        self.costs, self.penalty = costs, settings.penalty
        self.learned = nn.Parameter(torch.zeros(len(ranks), device=device))
        self.register_buffer("path", start.float().to(device), persistent=False)
        self.register_buffer("multipliers", torch.zeros(len(costs.allowed), device=device))
        self.register_buffer("ranks", torch.cat(list(ranks)).float().to(device), persistent=False)
        # The index of the site of each unit, (units,).
        index = torch.arange(len(ranks), device=device)
        self.register_buffer("index", index.repeat_interleave(torch.tensor(costs.sizes, device=device)))
        # True for units that always stay, (units,): at each site the units with the highest ranks, as many as the
        # budget demands.
        stays = torch.cat([(r.argsort(descending=True).argsort() < n) for r, n in zip(ranks, costs.least, strict=True)])
        self.register_buffer("stays", stays.to(device))

    def thresholds(self, progress: float) -> Tensor:
        """Returns the thresholds, (sites,): the starting thresholds at some progress, plus the learned changes.

        Args:
            progress: How far the target cost has fallen, from 0 (the cost of the dense model) to 1 (the budget). Larger
                values count as 1.
        """
        start = self.get_buffer("path")
        point = round(min(progress, 1.0) * (len(start) - 1))
        return start[point] + self.learned

    def forward(self, samples: int, slope: float, progress: float) -> Tensor:
        """Computes the gates for one batch.

        A gate is 1 if rank > threshold + noise, else 0. The noise has a logistic distribution. So a gate is 1 with the
        probability `(1 + tanh(slope (rank - threshold))) / 2`. The gradient of a gate is the gradient of this
        probability. In one sample, all units of a site have the same noise. So the sample keeps the units of a site
        with the highest ranks, as a plan does.

        Args:
            samples: The number of samples.
            slope: The slope of the probability as a function of the rank. With a larger slope, fewer gates are random.
            progress: How far the target cost has fallen, see `thresholds`.

        Returns:
            Gates (samples, units) of 0 and 1.
        """
        thresholds, index = self.thresholds(progress), self.get_buffer("index")
        margin = self.get_buffer("ranks") - thresholds[index]  # (units,)
        # sigmoid(2x) = (1 + tanh(x)) / 2.
        soft = torch.sigmoid(2 * slope * margin).masked_fill(self.get_buffer("stays"), 1.0)
        self._excess = self.costs.excess(soft[None], progress)[0]
        self._rates, self._thresholds = soft.detach(), thresholds.detach()
        # The shape is (samples, sites). The logit of a uniform number has a logistic distribution. It is infinite at 0
        # and 1.
        noise = torch.rand(samples, len(thresholds), device=soft.device).clamp(1e-6, 1 - 1e-6).logit() / (2 * slope)
        hard = ((margin.detach() > noise[:, index]) | self.get_buffer("stays")).to(soft.dtype)
        # The result has the value of `hard` and the gradient of `soft`.
        return hard + soft - soft.detach()

    def lagrangian(self) -> Tensor:
        """Returns the term that makes the cost meet the budget. The training adds it to the loss of the last batch.

        The term is `penalty / 2 * (R - target)^2 + multiplier * (R - target)`, summed over all limits of the budget. R
        is the expected cost and target the allowed cost, both as a fraction of the dense model's cost.
        """
        return (self.penalty / 2 * self._excess.square() + self.get_buffer("multipliers") * self._excess).sum()

    @torch.no_grad()
    def ascend(self) -> Tensor:
        """Changes each multiplier in proportion to the excess of the cost, which is the expected cost minus the target.

        A multiplier rises if the cost is above the target, and falls if it is below. Public implementations of the
        paper let the multiplier descend on the loss, but then the loss has no minimum.

        Returns:
            The excess for each limit of the budget, (limits,), as a fraction of the dense model's cost.
        """
        self.get_buffer("multipliers").add_(_PACE * self.penalty * self._excess.detach())
        return self._excess.detach()

    def state(self, excess: Tensor) -> dict[str, Any]:
        """Returns a record of the last batch for the history, as a dict that JSON can hold.

        Args:
            excess: The excess, (limits,), as `ascend` returned it.

        Returns:
            A dict. "rates": for each site, the expected fraction of its units that stay. "thresholds": the threshold of
            each site. "excess" and "multipliers": one number for each limit of the budget.
        """
        rates = [float(part.mean()) for part in self._rates.split(list(self.costs.sizes))]
        return {
            "rates": rates,
            "thresholds": self._thresholds.tolist(),
            "excess": excess.tolist(),
            "multipliers": self.get_buffer("multipliers").tolist(),
        }


_PACE = 0.1
"""How far a multiplier moves in one step: this factor times the penalty times the excess.

The method of multipliers uses the factor 1, because it finds a minimum of the loss before each change of the
multiplier. We make only one gradient step before each change.
"""
