"""Small models of the Hugging Face families that xprune prunes, for the tests and for `benchmarks.prunability`.

All weights are random. Nothing is downloaded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

TOKENS, CLASSES = 96, 5


def _images(size: int) -> dict[str, Any]:
    """Returns two random images of this height and width."""
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def _text(mask: bool = True) -> dict[str, Any]:
    """Returns two samples of 12 random tokens. With a mask, the second sample has only 8 tokens."""
    ids = torch.randint(4, TOKENS, (2, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12, 8])
    return {"input_ids": ids} | ({"attention_mask": (torch.arange(12) < lengths[:, None]).long()} if mask else {})


def _builder(model: str, config: str, inputs: Callable[[], Any], **fields: Any) -> Callable[[], tuple[nn.Module, Any]]:
    """Returns a function that builds (model, example inputs).

    Args:
        model: Name of the model class in transformers.
        config: Name of its config class.
        inputs: Returns the example inputs.
        fields: Fields of the config.
    """

    def build() -> tuple[nn.Module, Any]:
        # transformers is an optional dependency.
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**fields)).eval(), inputs()

    return build


_SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
_VIT: dict[str, Any] = {**_SIZES, "image_size": 32, "patch_size": 8, "num_labels": CLASSES}
_DINO: dict[str, Any] = {**_VIT, "mlp_ratio": 2}
_TEXT: dict[str, Any] = {**_SIZES, "vocab_size": TOKENS, "max_position_embeddings": 32, "num_labels": CLASSES}
_GROUPED: dict[str, Any] = {
    **_TEXT,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
_STAGES: dict[str, Any] = {"num_labels": CLASSES, "depths": [1, 1, 1, 1], "drop_path_rate": 0.1}


def _images_32() -> dict[str, Any]:
    return _images(32)


def _causal(family: str, config: str = "", **fields: Any) -> Callable[[], tuple[nn.Module, Any]]:
    """Returns a function that builds a language model of this family, with 2 key-value heads for 4 query heads."""
    return _builder(f"{family}ForCausalLM", config or f"{family}Config", _text, **{**_GROUPED, **fields})


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "hf vit": _builder("ViTForImageClassification", "ViTConfig", _images_32, **_VIT),
    "hf deit": _builder("DeiTForImageClassification", "DeiTConfig", _images_32, **_VIT),
    "hf swin": _builder(
        "SwinForImageClassification",
        "SwinConfig",
        lambda: _images(64),
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=CLASSES,
    ),
    "hf dinov2": _builder("Dinov2ForImageClassification", "Dinov2Config", _images_32, **_DINO),
    "hf dinov2 swiglu": _builder(
        "Dinov2ForImageClassification", "Dinov2Config", _images_32, **_DINO, use_swiglu_ffn=True
    ),
    "hf dinov2 registers": _builder(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", _images_32, **_DINO
    ),
    "hf beit": _builder(
        "BeitForImageClassification", "BeitConfig", _images_32, **_VIT, use_relative_position_bias=True
    ),
    "hf segformer": _builder(
        "SegformerForImageClassification",
        "SegformerConfig",
        lambda: _images(64),
        **_STAGES,
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 3, 4],
        mlp_ratios=[2, 2, 2, 2],
    ),
    "hf clip vision": _builder(
        "CLIPVisionModel", "CLIPVisionConfig", _images_32, **{k: v for k, v in _VIT.items() if k != "num_labels"}
    ),
    "hf clip text": _builder("CLIPTextModel", "CLIPTextConfig", _text, **_TEXT, eos_token_id=2),
    "hf bert": _builder("BertForSequenceClassification", "BertConfig", _text, **_TEXT),
    "hf roberta": _builder("RobertaForSequenceClassification", "RobertaConfig", _text, **_TEXT, pad_token_id=0),
    "hf distilbert": _builder(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _text,
        dim=24,
        n_layers=2,
        n_heads=3,
        hidden_dim=48,
        vocab_size=TOKENS,
        max_position_embeddings=32,
        num_labels=CLASSES,
    ),
    "hf gpt2": _builder(
        "GPT2LMHeadModel", "GPT2Config", _text, vocab_size=TOKENS, n_positions=32, n_embd=24, n_layer=2, n_head=3
    ),
    "hf llama": _causal("Llama"),
    "hf mistral": _causal("Mistral", sliding_window=4),
    "hf qwen2": _causal("Qwen2"),
    "hf qwen3": _causal("Qwen3"),
    "hf gemma": _causal("Gemma"),
    "hf gemma2": _causal("Gemma2", sliding_window=4, query_pre_attn_scalar=8),
    "hf gemma3": _causal("Gemma3", "Gemma3TextConfig", sliding_window=4, query_pre_attn_scalar=8),
}
"""Name of a family -> a function that builds (model, example inputs), small enough for a CPU."""
