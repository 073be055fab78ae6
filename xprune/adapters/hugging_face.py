"""The adapters for Hugging Face transformers. They name classes as text, so transformers is not imported.

The attentions of transformers reshape to (..., -1, head size). So their forwards work with any number of heads, and the
adapters need no `pruned` class.
"""

from typing import Any

from torch import Tensor

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Features, Forwards, Scope, Stream
from xprune.modules.removed import Removed


class RemovedAttention(Removed):
    """Replaces an attention of transformers that lost all its heads. Returns a tuple, as that attention does."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:  # type: ignore[override]
        """Returns (bias of the output projection for each token, None instead of the attention weights).

        The parameter is called `hidden_states` because some blocks of transformers give it as a keyword argument.
        """
        return super().forward(hidden_states), None


class RemovedPostNorm(RemovedAttention):
    """Replaces an attention of BERT that lost all its heads.

    The attention of BERT adds its input to its output and then applies a LayerNorm to the sum. Without heads, the
    output is a bias. So this module keeps the LayerNorm and returns LayerNorm(input + bias).
    """

    def __init__(self, layer: Any, module: Any) -> None:
        super().__init__(layer, module)
        self.norm = module.output.LayerNorm

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:  # type: ignore[override]
        """Returns (LayerNorm(input + bias), None instead of the attention weights)."""
        return self.norm(hidden_states + super().forward(hidden_states)[0]), None


def _named(*names: str) -> tuple[str, ...]:
    """Returns the full names of classes of transformers, from short names.

    "llama.LlamaAttention" becomes "transformers.models.llama.modeling_llama.LlamaAttention".
    """
    parts = (name.split(".") for name in names)
    return tuple(f"transformers.models.{family}.modeling_{family}.{kind}" for family, kind in parts)


QKV = (("q_proj", 1), ("k_proj", 1), ("v_proj", 1))
# Segformer makes keys and values from fewer tokens. A strided convolution and a norm layer make these tokens. Input and
# output of the convolution have the channels of the residual stream, so its weight shrinks along both axes.
REDUCTION = (
    ("sequence_reduction.sequence_reduction.weight", 0),
    ("sequence_reduction.sequence_reduction.weight", 1),
    ("sequence_reduction.sequence_reduction.bias", 0),
    ("sequence_reduction.layer_norm.weight", 0),
    ("sequence_reduction.layer_norm.bias", 0),
)
# Each class has some of these attributes. `Units` skips those that a class does not have.
ATTRIBUTES = ("num_attention_heads", "num_heads", "num_key_value_heads")

HUGGING_FACE = (
    Units(
        # With grouped queries (Llama, Qwen and others), a unit is one head of keys and values plus all its query heads.
        "hf-attention",
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
        count="",  # the forwards use only head_dim, and some classes do not store the number of heads
        also=Also(attributes=ATTRIBUTES, tensors=(("relative_position_bias.relative_position_bias_table", 1),)),
        features=Features(width="head_dim"),  # the number of units is the number of rows of v_proj / head_dim
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
        # The position bias of the heads belongs to the BeitLayer and not to its attention. So the adapter describes the
        # BeitLayer, and `inner` names the attention. BeitAttention is listed too, because surgery checks the class of
        # the module that the site names.
        "hf-beit",
        _named("beit.BeitLayer", "beit.BeitAttention"),
        tuple((f"attention.{name}", groups) for name, groups in QKV),
        consumer="attention.o_proj",
        count="attention.num_attention_heads",
        also=Also(tensors=(("relative_position_bias.relative_position_bias_table", 1),)),
        forwards=Forwards(removed=RemovedAttention),
        scope=Scope(
            inner="attention",
            # One table holds the bias for all layers, so one layer cannot lose a column of it.
            unless="attention.config.use_shared_relative_position_bias",
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
        # The attention adds its input and applies a LayerNorm to the sum, so this LayerNorm has the channels of the
        # stream.
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
        # split_size is the number of features of q, which k and v have too. Conv1D stores the attributes nx (input
        # features) and nf (output features).
        also=Also(attributes=("split_size", "c_attn.nf", "c_proj.nx")),
        features=Features(transposed=True),
        forwards=Forwards(removed=RemovedAttention),
        stream=Stream(attributes=("embed_dim", "c_attn.nx", "c_proj.nf")),
        scope=Scope(unless="is_cross_attention"),  # in a cross-attention, the queries come from another layer, q_attn
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
        "hf-mix-mlp",  # between the two layers is a depthwise convolution, with one channel for each neuron
        _named("segformer.SegformerMixMLP"),
        (("fc1", 1),),
        consumer="fc2",
        count="",
        kind="neuron",
        also=Also(layers=("dwconv.dwconv",), attributes=("dwconv.dwconv.groups",)),
    ),
)
