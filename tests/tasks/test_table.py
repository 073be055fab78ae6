"""Tests every task of the table `TASKS`: loss, distillation, metric, refusals, names, and a whole run."""

import copy
import math
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, f1_score, r2_score
from torch import nn

import xprune
from xprune.core.registry import resolve
from xprune.core.task import Task
from xprune.tasks import TASKS
from xprune.testing import check_task

SAMPLES, FEATURES = 24, 8


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns random numbers of a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, OTHER = noise(SAMPLES, FEATURES), noise(SAMPLES, FEATURES, seed=1)
ONE = (X.sum(1) > 0).long()
MANY = (X[:, :3] > 0).long()
SCORES = noise(SAMPLES, seed=2).clamp(-1, 1)
TOKENS = torch.randint(0, 9, (SAMPLES, 6), generator=torch.Generator().manual_seed(3))
MASKED = torch.where(noise(SAMPLES, 6, seed=4) > 0.8, TOKENS, -100)
GRAPH = SimpleNamespace(x=X, edge_index=torch.zeros(2, 1).long(), y=ONE, train_mask=X[:, 0] > 0)
BATCH = SimpleNamespace(x=X, edge_index=torch.zeros(2, 1).long(), y=ONE[:4], batch=torch.arange(SAMPLES) // 6)


class Residual(nn.Module):
    """Adds an MLP to its input, and applies a linear layer. The MLP is the only site."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FEATURES, 12), nn.ReLU(), nn.Linear(12, FEATURES))
        self.head = nn.Linear(FEATURES, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.mlp(x))


def mlp(out: int) -> nn.Module:
    """Returns a model from FEATURES to `out` features, with weights of a fixed seed."""
    torch.manual_seed(0)
    return Residual(out)


class Tokens(nn.Module):
    """Returns logits or features for each token."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(9, FEATURES), mlp(out)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return self.mlp(self.embed(input_ids))


def tokens(out: int) -> nn.Module:
    """Returns `Tokens` with weights of a fixed seed."""
    torch.manual_seed(0)
    return Tokens(out)


class Pixels(nn.Module):
    """Returns logits for each pixel, (batch, classes, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, FEATURES, 1), mlp(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(images).movedim(1, -1)).movedim(-1, 1)


class OnGraph(nn.Module):
    """Returns logits for each node, or for each graph if the graph of each node is given."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(2)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor | None = None) -> torch.Tensor:
        found = self.mlp(x)
        return found if batch is None else torch.stack([found[batch == g].mean(0) for g in range(4)])


@dataclass
class Example:
    """A task with a model and a batch that fit it."""

    task: Task
    model: nn.Module
    batch: Any
    run: bool = True
    bad: dict[str, tuple[Any, str]] = field(default_factory=dict)


def not_a_number(values: torch.Tensor) -> torch.Tensor:
    """Returns a copy whose first number is NaN."""
    values = values.clone()
    values.view(-1)[0] = torch.nan
    return values


EXAMPLES = {
    "classification": Example(xprune.Classification(), mlp(2), (X, ONE)),
    "multi-label": Example(
        xprune.MultiLabel(),
        mlp(3),
        (X, MANY),
        bad={
            "a label for a sample": ((X, ONE), r"\(24,\), wanted a tensor of shape \(batch, classes\).*Classification"),
            "counts": ((X, 2 * MANY), "a label is 2, wanted 0 or 1"),
            "NaN": ((X, not_a_number(MANY.float())), "a label is nan, wanted 0 or 1"),
            "no tensor": ((X, MANY.tolist()), "labels are a list"),
            "other classes": ((X, MANY[:, :2]), r"logits of shape \(24, 2\)"),
        },
    ),
    "regression": Example(
        xprune.Regression(),
        mlp(1),
        (X, X.sum(1)),
        bad={
            "NaN": ((X, not_a_number(X.sum(1))), "a target is NaN or infinite"),
            "complex": ((X, X.sum(1) + 1j), "real numbers"),
            "no axis": ((X, torch.tensor(1.0)), r"a tensor \(\), wanted"),
            "another shape": ((X, X[:, :2]), r"returns a tensor \(24, 1\), .* have the shape \(24, 2\)"),
            "a text": ((X, "numbers"), "targets are a str"),
        },
    ),
    "embeddings": Example(
        xprune.Embeddings(),
        mlp(5),
        (X, OTHER, SCORES),
        bad={
            "NaN": ((X, OTHER, not_a_number(SCORES)), "a score is nan, but scores go from -1 to 1"),
            "of the STS benchmark": ((X, OTHER, 5 * SCORES.abs() + 1), r"scores go from -1 to 1. Give Embeddings\(top"),
            "too few scores": ((X, OTHER, SCORES[:3]), r"\(3,\), for 24 first and 24 second samples"),
            "too few second samples": ((X, OTHER[:3], SCORES), "for 24 first and 3 second samples"),
            "no scores": ((X, OTHER), "a batch is a tuple of 2. Embeddings wants"),
            "lengths without a mask": ((TOKENS, TOKENS[:, :3], SCORES), "6 and 3 tokens, and there is no attention_m"),
            "two forms": (({"x": X}, OTHER, SCORES), r"cannot be joined: dict and \(24, 8\)"),
        },
    ),
    "tokens": Example(xprune.TokenClassification(), tokens(9), {"input_ids": TOKENS, "labels": MASKED}),
    "language-model": Example(xprune.LanguageModel(), tokens(9), {"input_ids": TOKENS}),
    "segmentation": Example(xprune.Segmentation(), Pixels(), (noise(6, 3, 4, 4), torch.arange(96).view(6, 4, 4) % 4)),
    "nodes": Example(xprune.NodeClassification(), OnGraph(), GRAPH),
    # The MLP of this model works on nodes, so its rows need the graph of each node.
    "graphs": Example(xprune.GraphClassification(), OnGraph(), BATCH, run=False),
}


def outputs_of(example: Example) -> tuple[torch.Tensor, Any]:
    """Returns the outputs of the model for the batch, and the targets."""
    inputs, targets = example.task.unpack(example.batch)
    outputs = example.task.forward(example.model, inputs)
    example.task.check(outputs, targets)
    return outputs, targets


def test_every_task_of_the_table_is_tested():
    # The targets of detection are dicts, so its tests have a file of their own.
    assert {*EXAMPLES, "detection"} == set(TASKS), "add a new task to EXAMPLES"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_name_gives_the_task(name):
    assert type(resolve(name, TASKS, Task, "task")) is type(EXAMPLES[name].task) is TASKS[name]
    assert TASKS[name].name == name
    assert isinstance(EXAMPLES[name].task.metric_name, str) and EXAMPLES[name].task.metric_name


@pytest.mark.parametrize("name", EXAMPLES)
def test_losses_are_finite_and_have_gradients(name):
    outputs, targets = outputs_of(EXAMPLES[name])
    for smoothing in (0.0, 0.1):
        loss = EXAMPLES[name].task.loss(outputs, targets, smoothing)
        assert loss.shape == () and bool(loss.isfinite())
        assert bool(torch.autograd.grad(loss, outputs, retain_graph=True)[0].abs().sum() > 0)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_zero_at_the_teacher_and_positive_elsewhere(name, temperature):
    task, (outputs, _) = EXAMPLES[name].task, outputs_of(EXAMPLES[name])
    assert type(task).distillation is not Task.distillation
    teacher = outputs.detach()
    at, slope = task.distillation(outputs, teacher, temperature), outputs
    assert float(at.detach()) == pytest.approx(0, abs=1e-7)
    assert float(torch.autograd.grad(at, slope)[0].abs().max()) < 1e-7, "the teacher is the minimum"
    for seed in range(3):
        other = teacher + noise(*teacher.shape, seed=seed)
        assert float(task.distillation(other, teacher, temperature)) > 1e-4


def test_distillation_of_numbers_and_labels_is_not_that_of_a_softmax():
    # A softmax does not change if the same number is added to all outputs. So it would not see these differences.
    teacher = noise(6, 3)
    for task in (xprune.Regression(), xprune.MultiLabel()):
        assert float(task.distillation(teacher + 1, teacher, 1.0)) > 0.01
    chances = teacher.double().sigmoid()
    other = (teacher + 1).double().sigmoid()
    by_hand = chances * (chances / other).log() + (1 - chances) * ((1 - chances) / (1 - other)).log()
    assert float(xprune.MultiLabel().distillation(teacher + 1, teacher, 1.0)) == pytest.approx(
        float(by_hand.mean()), rel=1e-5
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_task_passes_the_check_for_plug_ins(name):
    check_task(EXAMPLES[name].task, EXAMPLES[name].model, [EXAMPLES[name].batch])


class NotZero(xprune.Regression):
    """Its distillation has its minimum elsewhere."""

    def distillation(self, outputs, teacher, temperature):
        return (outputs - teacher - 1).square().mean()


class ByRows(xprune.Regression):
    """Its loss is not a mean over the batch."""

    def loss(self, outputs, targets, label_smoothing=0.0):
        return (outputs[:, 0] - targets).square()


class TooMany(xprune.Classification):
    """Says that there are fewer classes than there are."""

    def classes(self, outputs, targets):
        return targets, 1


WRONG = {
    "distillation": (NotZero(), (X, X.sum(1)), "the distillation of a model from itself is 1.0, wanted 0"),
    "loss": (ByRows(), (X, X.sum(1)), r"loss gives \(24,\), wanted a tensor with one number"),
    "classes": (TooMany(), (X, ONE), "classes go from 0 to 1"),
}


@pytest.mark.parametrize("how", WRONG)
def test_the_check_for_plug_ins_names_what_is_wrong(how):
    task, batch, message = WRONG[how]
    with pytest.raises(AssertionError, match=message):
        check_task(task, mlp(1 if how != "classes" else 2), [batch])


class Plain(Task):
    """A task without a distillation."""

    def unpack(self, batch):
        return batch

    def loss(self, outputs, targets, label_smoothing=0.0):
        return (outputs[:, 0] - targets).square().mean()

    def metric(self, outputs, targets):
        return (outputs[:, 0] - targets).abs()


def test_a_task_without_a_distillation_refuses_it_before_the_work():
    loader, tune = [(X, X.sum(1))], xprune.Finetune(epochs=1, distill=0.5)
    message = r"Plain has no distillation, which Finetune\(distill=\.\.\.\) needs: implement Task\.distillation"
    with pytest.raises(xprune.DataError, match=message):
        xprune.finetune(mlp(1), loader, tune, teacher=mlp(1), task=Plain())

    class Never(xprune.Criterion):
        name = "never"

        def score(self, context, sites):
            raise AssertionError("the run has started to score")

    with pytest.raises(xprune.DataError, match=message):
        xprune.Pruner(mlp(1), Never(), xprune.Budget(params=0.7), finetune=tune, task=Plain()).run(loader)


REFERENCES = {
    "mAP": (xprune.MultiLabel(), mlp(3), MANY, lambda o, y: average_precision_score(y, o, average="macro")),
    "F1": (xprune.MultiLabel(measure="F1"), mlp(3), MANY, lambda o, y: f1_score(y, o > 0, average="macro")),
    "R2": (xprune.Regression(), mlp(1), X.sum(1), lambda o, y: r2_score(y, o[:, 0])),
    "R2 of several": (xprune.Regression(), mlp(2), X[:, :2], lambda o, y: r2_score(y, o)),
    "MAE": (xprune.Regression(measure="MAE"), mlp(2), X[:, :2], lambda o, y: np.abs(o - y).mean()),
    "RMSE": (xprune.Regression(measure="RMSE"), mlp(2), X[:, :2], lambda o, y: np.sqrt(((o - y) ** 2).mean())),
    "MAE of integers": (xprune.Regression(measure="MAE"), mlp(1), ONE, lambda o, y: np.abs(o[:, 0] - y).mean()),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_metrics_agree_with_a_slow_reference(name):
    task, model, targets, reference = REFERENCES[name]
    batches = [(X[part], targets[part]) for part in (slice(0, 5), slice(5, 17), slice(17, None))]
    with torch.no_grad():
        expected = reference(model(X).double().numpy(), targets.numpy())
    found = xprune.evaluate(model, batches, task=task)
    assert found.metric == pytest.approx(float(expected), rel=1e-5)
    assert found.metric_name == name.split(" ")[0]
    assert found.higher_is_better == (found.metric_name not in ("MAE", "RMSE"))
    assert found.samples == SAMPLES


def test_the_average_precision_reads_logits_of_every_size():
    # torchmetrics would read logits between 0 and 1 as probabilities, batch by batch.
    logits = torch.tensor([[0.2], [0.9], [3.0], [-2.0]])
    batches = [(logits[:2], torch.tensor([[0], [1]])), (logits[2:], torch.tensor([[1], [0]]))]
    assert xprune.evaluate(nn.Identity(), batches, task=xprune.MultiLabel()).metric == 1


def test_a_class_without_samples_is_left_out_of_the_mean():
    labels = MANY.clone()
    labels[:, 1] = 0
    model = mlp(3)
    with torch.no_grad():
        logits = model(X).numpy()
    expected = [average_precision_score(labels[:, i], logits[:, i]) for i in (0, 2)]
    found = xprune.evaluate(model, [(X, labels)], task=xprune.MultiLabel())
    assert found.metric == pytest.approx(sum(expected) / 2, rel=1e-5)


def cosines(first, second):
    """Returns the cosine of each pair."""
    return (first * second).sum(1) / first.norm(dim=1) / second.norm(dim=1)


def test_embeddings_of_pairs_are_compared_with_their_scores():
    model, task = mlp(5), xprune.Embeddings(top=5)
    batches = [
        (X[:10], OTHER[:10], 5 * SCORES[:10]),
        {"first": X[10:], "second": OTHER[10:], "scores": 5 * SCORES[10:]},
    ]
    found = xprune.evaluate(model, batches, task=task)
    with torch.no_grad():
        similar = cosines(model(X), model(OTHER))
    assert found.metric == pytest.approx(spearmanr(similar, SCORES).statistic, abs=1e-5)
    assert found.loss == pytest.approx(float((similar - SCORES).square().mean()), rel=1e-4)
    assert found.samples == 2 * SAMPLES, "a pair has two samples"


def test_sentences_of_different_lengths_are_pooled_without_padding():
    model, task = tokens(5), xprune.Embeddings()
    # `arange` gives each sentence another length.
    lengths = torch.arange(SAMPLES) % 5 + 2
    mask = (torch.arange(6) < lengths[:, None]).long()
    short = {"input_ids": TOKENS[:, :3], "attention_mask": mask[:, :3]}
    inputs, _ = task.unpack((short, {"input_ids": TOKENS, "attention_mask": mask}, SCORES))
    with torch.no_grad():
        found = task.forward(model, inputs)
        features = model(TOKENS)
        # The first sides have at most 3 tokens.
        by_hand = [features[i, : min(int(n), 3)].mean(0) for i, n in enumerate(lengths)]
        by_hand += [features[i, : int(n)].mean(0) for i, n in enumerate(lengths)]
    expected = torch.stack(by_hand)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    first = xprune.Embeddings(pooling="first", normalise=False).forward(model, {"input_ids": TOKENS})
    torch.testing.assert_close(first, model(TOKENS)[:, 0])
    own = xprune.Embeddings(pooling=lambda outputs, inputs: outputs.amax(1), normalise=False)
    torch.testing.assert_close(own.forward(model, {"input_ids": TOKENS}), model(TOKENS).amax(1))


LABEL_FREE = {
    "a tensor": X,
    "a list with one entry": [X],
    "with labels": (X, ONE),
    "a mapping": {"x": X, "labels": ONE},
}


@pytest.mark.parametrize("form", LABEL_FREE)
def test_batches_without_scores_are_compared_with_the_dense_model(form):
    dense, other = mlp(5), mlp(5)
    with torch.no_grad():
        other.mlp[0].weight += 0.3
    task = xprune.Embeddings(measure="similarity")
    with pytest.raises(xprune.DataError, match=r"the dense model, which is not known: give Embeddings\(dense=model\)"):
        xprune.evaluate(other, [LABEL_FREE[form]], task=task)
    task = xprune.Embeddings(measure="similarity", dense=dense)
    with torch.no_grad():
        similar = cosines(dense(X), other(X))
    found = xprune.evaluate(other, [LABEL_FREE[form]], task=task)
    assert found.metric == pytest.approx(float(similar.mean()), rel=1e-5)
    assert found.loss == pytest.approx(float(1 - similar.mean()), rel=1e-4)
    assert xprune.evaluate(dense, [LABEL_FREE[form]], task=task).loss == pytest.approx(0, abs=1e-6)
    with pytest.raises(xprune.DataError, match="Spearman needs pairs with scores"):
        xprune.evaluate(dense, [LABEL_FREE[form]], task=xprune.Embeddings(dense=dense))


def test_taylor_without_labels_estimates_the_second_derivative_of_the_distance():
    model = mlp(5)
    sites = xprune.find_sites(model, X)
    batches = [X] * 150  # every batch has other random projections
    found = xprune.score(model, sites, batches, "taylor", task=xprune.Embeddings()).values[0]
    # The slow reference: the derivative of the normalised embedding with respect to each gate, by differences.
    hidden, consumer, head = model.mlp[:2], model.mlp[2], model.head
    with torch.no_grad():
        units, step, expected = hidden(X), 1e-3, []
        embed = lambda gates: nn.functional.normalize(head(X + consumer(units * gates)).double(), dim=1)  # noqa: E731
        for unit in range(12):
            gates = torch.ones(12)
            gates[unit] += step
            high = embed(gates)
            gates[unit] -= 2 * step
            expected.append(float(((high - embed(gates)) / (2 * step)).square().sum(1).mean()))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0.15, atol=1e-4)
    with pytest.raises(xprune.PluginError, match=r"kind=abs cannot score with Embeddings.*Use taylor,kind=squared"):
        xprune.score(model, sites, [X], "taylor,kind=abs", task=xprune.Embeddings())


def test_integrated_gradients_without_labels_add_up_to_the_distance():
    model = mlp(5)
    sites = xprune.find_sites(model, X)
    task, criterion = xprune.Embeddings(), "captum:IntegratedGradients,n_steps=64"
    scores = xprune.score(model, sites, [X], criterion, task=task)
    assert scores.classwise is None and scores.info["completeness_error"] < 0.05
    with torch.no_grad():
        bare = model.head(X + model.mlp[2](torch.zeros(SAMPLES, 12)))
        expected = (1 - cosines(model(X), bare)).mean()
    assert float(scores.values[0].sum()) == pytest.approx(float(expected), rel=0.05)
    with pytest.raises(xprune.DataError, match="explains the logits of classes, and Embeddings has no classes"):
        xprune.score(model, sites, [X], "captum:LayerConductance", task=task)
    with pytest.raises(xprune.DataError, match=r"Plain has no classes.*Task\.sample_scores"):
        xprune.score(mlp(1), sites, [(X, X.sum(1))], criterion, task=Plain())


@pytest.mark.parametrize("name, how", [(name, how) for name, example in EXAMPLES.items() for how in example.bad])
def test_bad_batches_are_named_errors(name, how):
    example, (batch, message) = EXAMPLES[name], EXAMPLES[name].bad[how]
    with pytest.raises(xprune.DataError, match=message):
        xprune.evaluate(example.model, [batch], task=example.task)


SETTINGS = {
    "multi-label,measure=accuracy": (xprune.DataError, "measure='accuracy' is unknown: MultiLabel measures one of mAP"),
    "multi-label,batch_axis=-1": (xprune.DataError, "batch_axis=-1"),
    "regression,measure=MSE": (xprune.DataError, "measure='MSE' is unknown: Regression knows R2, MAE, RMSE"),
    "regression,error=cosine": (xprune.DataError, "error='cosine' is unknown: Regression knows mse, l1, huber"),
    "embeddings,pooling=max": (xprune.DataError, "pooling='max' is unknown: give one of mean, first, pooler, or a fun"),
    "embeddings,top=0": (xprune.DataError, "top=0, wanted a number above 0"),
    "embeddings,batch_axis=1": (xprune.DataError, "samples along axis 0 only"),
    "embeddings,size=3": (xprune.PluginError, "embeddings has no setting 'size'; it has pooling, normalise, top"),
    "classification,axis=1": (xprune.PluginError, "classification has no setting 'axis'; it has batch_axis, class_n"),
    "dogs-and-cats": (xprune.PluginError, "unknown task 'dogs-and-cats'; known: classification, detection"),
}


@pytest.mark.parametrize("text", SETTINGS)
def test_wrong_settings_are_named_errors(text):
    kind, message = SETTINGS[text]
    with pytest.raises(kind, match=message):
        xprune.Pruner(mlp(2), task=text)


def test_settings_follow_the_name():
    assert resolve("regression,measure=RMSE,error=l1", TASKS, Task, "task") == xprune.Regression("l1", "RMSE")
    assert resolve("classification,batch_axis=1", TASKS, Task, "task").batch_axis == 1


RUNS = {
    **{name: example for name, example in EXAMPLES.items() if example.run},
    "embeddings without labels": Example(xprune.Embeddings(measure="similarity"), mlp(5), X),
    "sentences without labels": Example(
        xprune.Embeddings(measure="similarity"),
        tokens(5),
        {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)},
    ),
    "errors": Example(xprune.Regression(measure="RMSE", error="huber"), mlp(1), (X, X.sum(1))),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("criterion", ["taylor", "xpruner,steps=3"])
def test_a_whole_run(name, criterion, tmp_path):
    example = RUNS[name]
    tune = xprune.Finetune(epochs=3, lr=1e-3, distill=0.5)
    pruner = xprune.Pruner(
        copy.deepcopy(example.model), criterion, xprune.Budget(params=0.8), "global", tune, example.task, latency=False
    )
    result = pruner.run([example.batch])
    assert result.plan.removed
    assert all(math.isfinite(metrics.loss) for metrics in result.metrics.values())
    assert result.metrics["dense"].metric_name == example.task.metric_name
    assert result.metrics["finetuned"].loss <= result.metrics["pruned"].loss + 1e-6
    assert example.task.metric_name in result.summary()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the architecture of these models has no name
        result.save(tmp_path / "pruned")
    again = xprune.PruneResult.load(tmp_path / "pruned", lambda: copy.deepcopy(example.model))
    assert again.metrics == result.metrics and again.settings["task"] == example.task.name


def test_a_masked_language_model_skips_samples_without_a_mask():
    labels = torch.tensor([[3, -100, -100], [-100, -100, -100], [-100, 4, 5]])
    logits, task = noise(3, 3, 9).requires_grad_(), xprune.TokenClassification()
    task.check(logits, labels)
    with_labels = [0, 2]
    torch.testing.assert_close(task.loss(logits, labels), task.loss(logits[with_labels], labels[with_labels]))
    assert task.counted(labels) == 2 and task.size(labels) == 3
    alone = task.loss(logits, torch.full_like(labels, -100))
    assert float(alone) == 0 and not torch.autograd.grad(alone, logits)[0].any()

    model = nn.Sequential(nn.Embedding(9, FEATURES), mlp(9))
    rows = [(TOKENS[:3, :3], labels), (TOKENS[3:6, :3], torch.full_like(labels, -100)), (TOKENS[6:9, :3], labels)]
    kept = [(ids[(wanted != -100).any(1)], wanted[(wanted != -100).any(1)]) for ids, wanted in rows]
    found, expected = (xprune.evaluate(model, batches, task=task) for batches in (rows, [kept[0], kept[2]]))
    assert (found.loss, found.metric) == (pytest.approx(expected.loss), pytest.approx(expected.metric))
    assert (found.samples, expected.samples) == (9, 4)
    sites = xprune.find_sites(model, TOKENS[:3, :3])
    # Samples without labels have gradients of 0. They change all scores by one factor.
    ours, theirs = (xprune.score(model, sites, batches, "taylor", task=task) for batches in (rows, [kept[0], kept[2]]))
    torch.testing.assert_close(ours.values[0] * 9, theirs.values[0] * 4)
    with pytest.raises(xprune.DataError, match="no sample has a label that counts, among 3 validation samples"):
        xprune.evaluate(model, [rows[1]], task=task)


def test_multi_label_classes_are_those_of_the_sample():
    task, targets = xprune.MultiLabel(), MANY[MANY.any(1)].float()
    for seed in range(5):
        torch.manual_seed(seed)
        own, count = task.classes(noise(len(targets), 3), targets)
        assert count == 3 and bool(targets.gather(1, own[:, None]).all())
        other = task.other(targets, own, 3)
        full = targets.all(1)
        assert not targets.gather(1, other[:, None])[~full].any() and bool((other != own).all())


@pytest.mark.parametrize("gone", [False, True])
def test_one_vs_rest_of_many_labels(gone):
    task, targets, logits = xprune.MultiLabel(), MANY.float(), noise(SAMPLES, 3).double()
    drawn, losses = torch.arange(SAMPLES) % 3, []
    for i, (row, wanted) in enumerate(zip(logits.sigmoid(), targets, strict=True)):
        p, has = row[drawn[i]], wanted[drawn[i]] == 1
        if gone:
            crossed = -(wanted * row.log() + (1 - wanted) * (1 - row).log()).mean()
            losses.append(-(1 - p).log() if has else crossed)
        else:
            losses.append(-p.log() if has else -(1 - p).log())
    torch.testing.assert_close(
        task.one_vs_rest(logits.float(), targets, drawn, gone).double(),
        torch.stack(losses).mean(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_r2_of_one_sample_is_a_named_error():
    with pytest.raises(xprune.DataError, match="the metric R2Score of Regression cannot be computed"):
        xprune.evaluate(mlp(1), [(X[:1], X[:1].sum(1))], task=xprune.Regression())
