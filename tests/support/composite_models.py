"""Returns small models that consist of several models: two towers, and composite models of transformers."""

import torch
from torch import nn
from torch.nn import functional as F

import xprune


class Block(nn.Module):
    """A transformer block with an attention of torch and an MLP."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x):
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """Some blocks, and the mean over the tokens."""

    def __init__(self, dim, heads, hidden, blocks, features=6):
        super().__init__()
        self.enter = nn.Linear(features, dim)
        self.blocks = nn.ModuleList(blocks or [Block(dim, heads, hidden) for _ in range(2)])

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class Towers(nn.Module):
    """Two towers of a user, which both see the input, and a classifier. A tower or its last block may be shared."""

    def __init__(self, shared=False):
        super().__init__()
        both = Block(12, 3, 20) if shared else None
        self.left = Tower(12, 3, 20, [Block(12, 3, 20), both] if shared else None)
        self.right = Tower(12, 3, 20, [Block(12, 3, 20), both] if shared else None)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        return self.head(torch.cat([self.left(x), self.right(x)], 1))


def towers(shared=False):
    """Returns `Towers` and its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Towers(shared).eval(), torch.randn(3, 5, 6)


def batches(count=2):
    """Returns batches of 6 samples for `Towers`, with labels."""
    chance = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 5, 6, generator=chance), torch.arange(6) % 3) for _ in range(count)]


def clip():
    """A CLIP model: a text tower and a vision tower."""
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config={**text, "num_attention_heads": 4, "eos_token_id": 49},
        vision_config={**vision, "num_attention_heads": 3},
        projection_dim=16,
    )
    ids = torch.cat([torch.randint(2, 47, (3, 5)), torch.full((3, 1), 49)], 1)
    return CLIPModel(config).eval(), {"input_ids": ids, "pixel_values": torch.randn(3, 3, 16, 16)}


def llava():
    """A LLaVA model: a vision tower, a projector, and a language model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, num_attention_heads=3),
        text_config=LlamaConfig(**text, num_attention_heads=4, num_key_value_heads=2),
        image_token_index=59,
        image_token_id=59,
        image_seq_length=4,
    )
    ids = torch.randint(2, 50, (2, 9))
    ids[:, 1:5] = 59
    return LlavaForConditionalGeneration(config).eval(), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def whisper():
    """A Whisper model: an encoder of sound and a decoder of text."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _SIDE.items()}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    lengths = {"max_source_positions": 10, "max_target_positions": 12}
    config = WhisperConfig(vocab_size=60, d_model=32, num_mel_bins=8, **lengths, **sides, **special)
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(4, 59, (2, 6))}
    return WhisperForConditionalGeneration(config).eval(), inputs


_SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
MODELS = {"towers": towers, "clip": clip, "llava": llava, "whisper": whisper}
PARTS = [
    ("towers", "left.*"),
    ("towers", "left.blocks.1.*"),
    ("clip", "vision_model.*"),
    ("clip", "text_model.*"),
    ("llava", "model.vision_tower.*"),
    ("llava", "model.language_model.*"),
    ("whisper", "model.encoder.*"),
    ("whisper", "model.decoder.*"),
]
"""Models with a part of each."""


class Contrastive(xprune.Task):
    """The task of CLIP: each image belongs to the text of the same sample."""

    def unpack(self, batch):
        return dict(batch), torch.arange(len(batch["input_ids"]))

    def forward(self, model, inputs):
        return model(**inputs).logits_per_image

    def loss(self, outputs, targets, label_smoothing=0.0):
        return F.cross_entropy(outputs, targets)

    def metric(self, outputs, targets):
        return (outputs.argmax(1) == targets).float()


def task_and_batch(name):
    """Returns the task of a model and a batch for it."""
    inputs = MODELS[name]()[1]
    if name == "towers":
        return None, batches(1)[0]
    if name == "clip":
        return Contrastive(), inputs
    labels = inputs["input_ids" if name == "llava" else "decoder_input_ids"]
    return xprune.TokenClassification(), {**inputs, "labels": labels}
