"""The task of embeddings: vectors whose directions say how similar two samples are, such as two sentences."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.task import Task, checked_batch_axis
from xprune.errors import DataError
from xprune.modules.calls import call, lengths, tensors_in
from xprune.modules.copies import shared_copy

if TYPE_CHECKING:
    from torchmetrics import Metric

POOLINGS = ("mean", "first", "pooler")
"""The allowed texts of `Embeddings.pooling`."""
MEASURES = ("Spearman", "similarity")
"""The allowed values of `Embeddings.measure`."""


class Wanted(NamedTuple):
    """The targets of a batch: what `Embeddings` needs to compute its loss.

    Attributes:
        inputs: The inputs of the model. The embeddings of the dense model are computed from them.
        scores: The similarity of each pair, float32 (pairs,). None if the batch has no scores.
        samples: The number of samples. A pair has two samples.
    """

    inputs: Any
    scores: Tensor | None
    samples: int


@dataclass(frozen=True)
class Embeddings(Task):
    """Embeddings of sentences, images or other samples. The metric is Spearman's rank correlation, or a similarity.

    A batch has one of two forms, and both may be used in one run, for example one in training and one in measurement.

    - **Without scores**: the inputs alone. They are a tensor, a mapping of keyword arguments such as "input_ids" and
      "attention_mask", or a tuple or list with one entry. Labels are allowed and are not used: in a pair (inputs,
      labels (batch,)), or under the key "labels" of a mapping. The loss is the distance to the embeddings of the dense
      model. So no labels are needed to score and to fine-tune.
    - **Pairs with scores**: (first inputs, second inputs, scores), or a mapping with the keys "first", "second" and
      "scores". The scores are numbers (pairs,), and a higher score means more similar. The loss is the mean squared
      difference between the cosine of the two embeddings and the score divided by `top`.

    A sample is one sentence or image. So a pair has two samples, and MACs are those of one sentence. Sentences of
    different lengths are padded with 0, where "attention_mask" becomes 0 too.

    **Distance.** Half of the squared distance between the two embeddings, divided by the squared length of the dense
    model's embedding, as the mean over samples. With `normalise`, this is 1 minus the cosine.

    **Scores of `taylor` without labels.** The distance has its minimum at the dense model, where all its gradients are
    0. So `taylor` uses another quantity there: the second derivative of the distance with respect to each gate, which
    is the squared length of the derivative of the embedding. The squared gradient of a random projection of the
    embedding is an unbiased estimate of it. This is the Fisher information of a Gaussian around the embedding, with
    targets that are sampled from the model (Kunstner et al., Limitations of the empirical Fisher approximation, NeurIPS
    2019, section 2). The criterion `taylor,kind=abs` would compute a mean of 0, and is refused.

    Args:
        pooling: How outputs become one vector for each sample. "mean" is the mean over the tokens whose
            "attention_mask" is 1, or over all tokens if the inputs have no mask. "first" is the first token. "pooler"
            is the entry `pooler_output` of the outputs. If the model returns a tensor (batch, features), it is used as
            it is, with "mean" and "first". Any other pooling is a function of (outputs of the model, inputs) that
            returns (batch, features).
        normalise: If True, each embedding is divided by its length.
        top: The score of two samples with the same meaning. It is 5 in the STS benchmark. Scores go from -top to top.
        measure: The metric. "Spearman" is the rank correlation between the cosines and the scores of all pairs. It
            needs pairs with scores. "similarity" is the mean cosine between the embeddings of the model and those of
            the dense model. It needs no scores.
        dense: The dense model, whose embeddings are the targets of batches without scores. `Pruner`, `compare`, `score`
            and `select` set it. Give it if you call `evaluate` or `finetune` with such batches.
        batch_axis: The axis of the model's inputs along which samples lie. Only 0 is allowed.

    Raises:
        DataError: A setting is unknown or out of range.

    Example:
        >>> model = nn.Embedding(9, 4)  # returns (batch, tokens, features)
        >>> task = Embeddings(top=5)
        >>> first, second = torch.tensor([[1, 2]]), torch.tensor([[2, 1]])
        >>> inputs, targets = task.unpack((first, second, torch.tensor([5.0])))
        >>> found = task.forward(model, inputs)
        >>> found.shape  # one pair, which has two samples
        torch.Size([2, 4])
        >>> round(float(task.loss(found, targets)), 4)  # the mean is the same in any order
        0.0
    """

    pooling: str | Callable[[Any, Any], Tensor] = "mean"
    normalise: bool = True
    top: float = 1.0
    measure: str = "Spearman"
    dense: nn.Module | None = field(default=None, repr=False, compare=False)
    batch_axis: int = 0
    name: ClassVar[str] = "embeddings"

    def __post_init__(self) -> None:
        if not callable(self.pooling) and self.pooling not in POOLINGS:
            raise DataError(
                f"pooling={self.pooling!r} is unknown: give one of {', '.join(POOLINGS)}, or a function of (outputs, "
                "inputs) that returns (batch, features)."
            )
        if self.measure not in MEASURES:
            raise DataError(f"measure={self.measure!r} is unknown: Embeddings measures one of {', '.join(MEASURES)}.")
        if isinstance(self.top, bool) or not isinstance(self.top, (int, float)) or not 0 < self.top < float("inf"):
            raise DataError(f"top={self.top!r}, wanted a number above 0: the score of two samples of the same meaning.")
        if checked_batch_axis(self.batch_axis) != 0:
            raise DataError("Embeddings reads inputs with samples along axis 0 only: leave out batch_axis.")
        # The class is frozen, so the attribute is set in this way.
        object.__setattr__(self, "metric_name", self.measure)

    def with_dense(self, dense: nn.Module) -> "Embeddings":
        """Returns a task with this dense model, unless the task has one already. See Task.with_dense."""
        if self.dense is not None:
            return self
        bound = copy.copy(self)
        # The copy shares the weights of the dense model. Gates and hooks of other stages do not act on it.
        object.__setattr__(bound, "dense", shared_copy(dense, requires_grad=False))
        return bound

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (inputs of all samples, `Wanted`). The first sides of all pairs come before the second sides.

        Raises DataError if the batch has another form. See Task.unpack.
        """
        found = _pairs(batch)
        if found is not None:
            first, second, scores = found
            inputs = _joined(first, second)
            return inputs, Wanted(inputs, self._checked_scores(scores, first, second), _count(inputs))
        inputs = _single(batch)
        return inputs, Wanted(inputs, None, _count(inputs))

    def _checked_scores(self, scores: Any, first: Any, second: Any) -> Tensor:
        """Returns the scores as float32 (pairs,). Raises DataError if they do not fit the pairs."""
        pairs = _count(first)
        if not isinstance(scores, Tensor) or scores.shape != (pairs,) or _count(second) != pairs or scores.is_complex():
            what = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise DataError(
                f"the scores are {what}, for {pairs} first and {_count(second)} second samples. Wanted a tensor of "
                "shape (pairs,) with a similarity for each pair."
            )
        numbers = scores.float()
        # NaN is not at most `top`, so it is refused here too.
        wrong = numbers[~(numbers.abs() <= self.top)]
        if len(wrong):
            raise DataError(
                f"a score is {wrong[0].item():g}, but scores go from {-self.top:g} to {self.top:g}. Give Embeddings("
                "top=...) the score of two samples with the same meaning, such as 5 in the STS benchmark."
            )
        return numbers

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """Returns the embeddings, float32 (batch, features). See Task.forward.

        Raises DataError if the pooling does not fit the outputs of the model.
        """
        pooled = self._pooled(call(model, inputs), inputs)
        if not isinstance(pooled, Tensor) or pooled.dim() != 2:
            what = f"a tensor {tuple(pooled.shape)}" if isinstance(pooled, Tensor) else f"a {type(pooled).__name__}"
            raise DataError(
                f"pooling={self.pooling!r} gives {what}, wanted embeddings of shape (batch, features). Give pooling= a "
                "function of (outputs, inputs) that returns them."
            )
        pooled = pooled.float()
        return F.normalize(pooled, dim=-1) if self.normalise else pooled

    def _pooled(self, outputs: Any, inputs: Any) -> Any:
        """Returns one vector for each sample, (batch, features), if the pooling fits the outputs."""
        if callable(self.pooling):
            return self.pooling(outputs, inputs)
        if self.pooling == "pooler":
            return _entry(outputs, "pooler_output")
        tokens = outputs if isinstance(outputs, Tensor) else _entry(outputs, "last_hidden_state")
        # A model with one vector for each sample has pooled its tokens already.
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            return tokens
        if self.pooling == "first":
            return tokens[:, 0]
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if mask is None:
            return tokens.mean(1)
        weights = mask.to(tokens)[..., None]
        return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)

    def check(self, outputs: Any, targets: Any) -> None:
        """Raises DataError if the embeddings are not one for each sample. See Task.check."""
        if len(outputs) != targets.samples:
            raise DataError(
                f"the model returns {len(outputs)} embeddings for {targets.samples} samples. Give a pooling that "
                "returns one embedding for each sample."
            )

    def size(self, targets: Any) -> int:
        """Returns the number of samples. A pair has two. See Task.size."""
        return int(targets.samples)

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the loss of the pairs, or the distance to the dense model. `label_smoothing` is ignored.

        Raises DataError if the batch has no scores and the dense model is not known. See Task.loss.
        """
        if targets.scores is None:
            return _distances(outputs, self._of_dense(targets, outputs)).mean()
        return F.mse_loss(_cosines(outputs), targets.scores / self.top)

    def probe_loss(self, outputs: Any, targets: Any) -> Tensor | None:
        """Returns the mean of random projections of the embeddings, if the batch has no scores. See Task.probe_loss.

        `Embeddings` describes why. Each embedding is divided by its length, as in the distance.
        """
        if targets.scores is not None:
            return None
        scale = outputs.detach().norm(dim=-1).clamp_min(_TINY)
        return ((outputs * torch.randn_like(outputs)).sum(-1) / scale).mean()

    def sample_scores(self, outputs: Any, targets: Any, dense: Any) -> Tensor | None:
        """Returns the negative distance of each sample to the dense model, (batch,), also for pairs with scores.

        See Task.sample_scores.
        """
        return -_distances(outputs, dense)

    def new_metric(self, outputs: Any) -> "Metric":
        """Returns a metric without samples yet. See Task.new_metric."""
        from torchmetrics import SpearmanCorrCoef

        from xprune.core.metric import MeanOfSamples, in_double

        if self.measure == "similarity":
            return in_double(MeanOfSamples(), outputs)
        with warnings.catch_warnings():
            # The metric warns that it stores two numbers for each pair, which need little memory.
            warnings.filterwarnings("ignore", message=".*will save all targets and predictions")
            return SpearmanCorrCoef()

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds a batch to the metric. See Task.update.

        Raises DataError if the metric is the rank correlation and the batch has no scores.
        """
        if self.measure == "similarity":
            metric.update(F.cosine_similarity(outputs, self._of_dense(targets, outputs)))
            return
        if targets.scores is None:
            raise DataError(
                "the rank correlation of Spearman needs pairs with scores, and a batch has none. Measure on batches "
                '(first, second, scores), or without scores by Embeddings(measure="similarity").'
            )
        metric.update(_cosines(outputs), targets.scores)

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns the mean distance to the embeddings of the teacher. The temperature is ignored.

        See Task.distillation.
        """
        return _distances(outputs, teacher).mean()

    @torch.no_grad()
    def _of_dense(self, targets: Wanted, outputs: Tensor) -> Tensor:
        """Returns the embeddings of the dense model for a batch, (batch, features). Raises DataError without a model.

        Args:
            targets: The targets of the batch.
            outputs: The embeddings of the model. Those of the dense model are on the same device.
        """
        if self.dense is None:
            raise DataError(
                "a batch without scores is compared with the embeddings of the dense model, which is not known: give "
                "Embeddings(dense=model). Pruner, compare, score and select know it."
            )
        parameter = next(self.dense.parameters(), None)
        if parameter is not None and parameter.device != outputs.device:
            self.dense.to(outputs.device)
        found: Tensor = self.forward(self.dense.eval(), targets.inputs)
        return found


_TINY = 1e-12
"""Lengths are not divided by less than this, so that an embedding of 0 gives no NaN."""


def _distances(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Returns half of the squared distance between embeddings, divided by the squared length of the wanted one.

    Args:
        outputs: The embeddings, (batch, features).
        wanted: The wanted embeddings, (batch, features). They get no gradient.

    Returns:
        The distances, (batch,).
    """
    wanted = wanted.detach()
    return (outputs - wanted).square().sum(-1) / (2 * wanted.square().sum(-1).clamp_min(_TINY**2))


def _cosines(outputs: Tensor) -> Tensor:
    """Returns the cosine of each pair, (pairs,). The first sides of all pairs come before the second sides."""
    first, second = outputs.chunk(2)
    return F.cosine_similarity(first, second)


def _entry(outputs: Any, name: str) -> Any:
    """Returns an entry or attribute of the outputs of a model. If there is none, returns the outputs."""
    if isinstance(outputs, Mapping):
        return outputs.get(name, outputs)
    return getattr(outputs, name, outputs)


def _count(inputs: Any) -> int:
    """Returns the number of samples of some inputs: the length of their first tensor or list."""
    return next(iter(lengths(inputs)), 0)


def _pairs(batch: Any) -> tuple[Any, Any, Any] | None:
    """Returns (first inputs, second inputs, scores) of a batch of pairs. None if the batch has another form."""
    if isinstance(batch, Mapping) and {"first", "second", "scores"} <= set(batch):
        return batch["first"], batch["second"], batch["scores"]
    return (batch[0], batch[1], batch[2]) if isinstance(batch, (tuple, list)) and len(batch) == 3 else None


def _single(batch: Any) -> Any:
    """Returns the inputs of a batch without scores. Raises DataError if the batch has another form."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping) and tensors_in(batch) and not {"first", "second"} & set(batch):
        # BatchEncoding and other mappings of libraries become a dict.
        return {name: value for name, value in batch.items() if name != "labels"}
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        labels = batch[1] if len(batch) == 2 else None
        if labels is None or (isinstance(labels, Tensor) and labels.dim() == 1):
            return _single(batch[0]) if isinstance(batch[0], Mapping) else batch[0]
    what = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else "")
    raise DataError(
        f"a batch is a {what}. Embeddings wants inputs alone, as a tensor or a mapping, or pairs (first, second, "
        "scores)."
    )


def _joined(first: Any, second: Any, masked: bool = False) -> Any:
    """Joins the inputs of both sides of pairs along the samples.

    Args:
        first: The inputs of the first sides.
        second: The inputs of the second sides.
        masked: True if the inputs have an "attention_mask". Only then, tokens may be padded with 0.

    Raises:
        DataError: The two sides do not have the same form, or tokens would be padded without a mask.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping) and set(first) == set(second):
        masked = "attention_mask" in first
        return {name: _joined(first[name], second[name], masked) for name in first if name != "labels"}
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)) and len(first) == len(second):
        # torch's default collation turns tuples into lists. Several tensors are arguments of the model.
        return tuple(_joined(a, b, masked) for a, b in zip(first, second, strict=True))
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() == second.dim() > 0:
        if first.shape[1:] == second.shape[1:]:
            return torch.cat([first, second])
        if first.dim() == 2 and not first.is_floating_point():
            if not masked:
                raise DataError(
                    f"the two sides of the pairs have {first.shape[1]} and {second.shape[1]} tokens, and there is no "
                    "attention_mask that says which tokens are padding. Give mappings with attention_mask, or pad both "
                    "sides to one length."
                )
            tokens = max(first.shape[1], second.shape[1])
            return torch.cat([F.pad(side, (0, tokens - side.shape[1])) for side in (first, second)])
    shapes = [tuple(side.shape) if isinstance(side, Tensor) else type(side).__name__ for side in (first, second)]
    raise DataError(
        f"the two sides of the pairs cannot be joined: {shapes[0]} and {shapes[1]}. Give both sides in one form, with "
        "samples of one size."
    )
