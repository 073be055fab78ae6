"""Attentions and MLPs of Hugging Face transformers, by their names there: nothing of it is imported."""

from typing import Any

from torch import Tensor

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Features, Forwards, Scope, Stream
from xprune.modules.removed import Removed


class RemovedAttention(Removed):
    """What is left of an attention that takes `hidden_states` and returns (output, weights)."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:  # type: ignore[override]
        """(bias of the last layer, None)."""
        return super().forward(hidden_states), None


class RemovedPostNorm(RemovedAttention):
    """What is left of BERT's attention, which adds its input and norms the sum itself."""

    def __init__(self, layer: Any, module: Any) -> None:
        super().__init__(layer, module)
        self.norm = module.output.LayerNorm

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:  # type: ignore[override]
        """(norm of input + bias, None)."""
        return self.norm(hidden_states + super().forward(hidden_states)[0]), None


def _named(*names: str) -> tuple[str, ...]:
    """Qualified names: "llama.LlamaAttention" stands for transformers.models.llama.modeling_llama.LlamaAttention."""
    parts = (name.split(".") for name in names)
    return tuple(f"transformers.models.{family}.modeling_{family}.{kind}" for family, kind in parts)


QKV = (("q_proj", 1), ("k_proj", 1), ("v_proj", 1))
REDUCTION = (  # Segformer's, of the tokens that make keys and values
    ("sequence_reduction.sequence_reduction.weight", 0),
    ("sequence_reduction.sequence_reduction.weight", 1),
    ("sequence_reduction.sequence_reduction.bias", 0),
    ("sequence_reduction.layer_norm.weight", 0),
    ("sequence_reduction.layer_norm.bias", 0),
)
ATTRIBUTES = ("num_attention_heads", "num_heads", "num_key_value_heads")

HUGGING_FACE = (
    Units(
        "hf-attention",  # with keys and values that query heads share, a unit is all that goes with one of them
        _named(
            "deit.DeiTAttention",
            "dinov2.Dinov2Attention",
            "dinov2_with_registers.Dinov2WithRegistersAttention",
            "gemma.GemmaAttention",
            "gemma2.Gemma2Attention",
            "gemma3.Gemma3Attention",
            "llama.LlamaAttention",
            "mistral.MistralAttention",
            "qwen2.Qwen2Attention",
            "qwen3.Qwen3Attention",
            "segformer.SegformerAttention",
            "swin.SwinAttention",
            "vit.ViTAttention",
        ),
        QKV,
        consumer="o_proj",
        count="",
        also=Also(attributes=ATTRIBUTES, tensors=(("relative_position_bias.relative_position_bias_table", 1),)),
        features=Features(width="head_dim"),
        forwards=Forwards(removed=RemovedAttention),
        stream=Stream(tensors=REDUCTION),
    ),
    Units(
        "hf-clip",
        _named("clip.CLIPAttention"),
        QKV,
        consumer="out_proj",
        forwards=Forwards(removed=RemovedAttention),
    ),
    Units(
        "hf-beit",  # the bias of its heads stands beside the attention
        _named("beit.BeitLayer", "beit.BeitAttention"),
        tuple((f"attention.{name}", groups) for name, groups in QKV),
        consumer="attention.o_proj",
        count="attention.num_attention_heads",
        also=Also(tensors=(("relative_position_bias.relative_position_bias_table", 1),)),
        forwards=Forwards(removed=RemovedAttention),
        scope=Scope(
            inner="attention",
            unless="attention.config.use_shared_relative_position_bias",  # one table for the heads of all layers
        ),
    ),
    Units(
        "hf-bert",
        _named("bert.BertAttention", "roberta.RobertaAttention"),
        (("self.query", 1), ("self.key", 1), ("self.value", 1)),
        consumer="output.dense",
        count="self.num_attention_heads",
        also=Also(attributes=("self.all_head_size",)),
        forwards=Forwards(removed=RemovedPostNorm),
        stream=Stream(joins=True, tensors=(("output.LayerNorm.weight", 0), ("output.LayerNorm.bias", 0))),
    ),
    Units(
        "hf-distilbert",
        _named("distilbert.DistilBertSelfAttention"),
        (("q_lin", 1), ("k_lin", 1), ("v_lin", 1)),
        consumer="out_lin",
        count="n_heads",
        forwards=Forwards(removed=RemovedAttention),
    ),
    Units(
        "hf-gpt2",
        _named("gpt2.GPT2Attention"),
        (("c_attn", 3),),
        consumer="c_proj",
        also=Also(attributes=("split_size", "c_attn.nf", "c_proj.nx")),
        features=Features(transposed=True),
        forwards=Forwards(removed=RemovedAttention),
        stream=Stream(attributes=("embed_dim", "c_attn.nx", "c_proj.nf")),
        scope=Scope(unless="is_cross_attention"),
    ),
    Units(
        "hf-gpt2-mlp",
        _named("gpt2.GPT2MLP"),
        (("c_fc", 1),),
        consumer="c_proj",
        count="",
        kind="neuron",
        also=Also(attributes=("c_fc.nf", "c_proj.nx")),
        features=Features(transposed=True),
        stream=Stream(attributes=("c_fc.nx", "c_proj.nf")),
    ),
    Units(
        "hf-mix-mlp",  # a depthwise convolution stands between its layers
        _named("segformer.SegformerMixMLP"),
        (("fc1", 1),),
        consumer="fc2",
        count="",
        kind="neuron",
        also=Also(layers=("dwconv.dwconv",), attributes=("dwconv.dwconv.groups",)),
    ),
)
