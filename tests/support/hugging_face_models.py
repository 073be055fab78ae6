"""Returns small Hugging Face models with random weights, and batches for them."""

import torch
from torch.utils.data import DataLoader

import xprune
from benchmarks.hugging_face_models import CLASSES, MODELS, TOKENS
from xprune.testing import perturb, random_plan


def build(name):
    """Returns the model of this name, with every weight random, and its inputs."""
    model, inputs = MODELS[name]()
    return perturb(model), inputs


def pruned(name, seed=1, gone=0.3):
    model, inputs = build(name)
    return xprune.apply(model, random_plan(xprune.find_sites(model, inputs), seed, gone), inputs), inputs


def rows(name, count=16):
    """Returns batches of 8 samples, as mappings, with a label that can be learned."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    if "pixel_values" in MODELS[name]()[1]:
        inputs = torch.randn(count, 3, 32, 32, generator=chance) + labels[:, None, None, None]
        data = [{"pixel_values": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    else:
        ids = torch.randint(4, TOKENS, (count, 12), generator=chance)
        ids[:, 0] = labels
        mask = (torch.arange(12) < torch.randint(6, 13, (count, 1), generator=chance)).long()
        data = [{"input_ids": x, "attention_mask": m, "labels": y} for x, m, y in zip(ids, mask, labels, strict=True)]
    return DataLoader(data, batch_size=8)


def counting(count=32, length=12):
    """Returns batches of 8 sequences of tokens that count upwards."""
    ids = torch.arange(length) + torch.randint(
        4, TOKENS - length, (count, 1), generator=torch.Generator().manual_seed(0)
    )
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=8)


@torch.no_grad()
def first(model, inputs):
    outputs = model(**inputs)
    return outputs[0]
