"""Holds small models in the styles in which people write their own attentions and MLPs.

    python -m benchmarks.own_models [--only NAME]

Each model of `ZOO` is written the way an author would write it who does not know xprune. Each entry says how many
attentions and MLPs a perfect tool would find, and how many heads each attention has. The command compares this with
the sites that `xprune.find_sites` finds, and prunes each model with three plans. Nothing is recorded.

Weights are random, with noise on every parameter. All models are deterministic in eval mode, and have far fewer than
0.3 million parameters. The inputs are a batch of two samples.
"""

import copy
import math
import multiprocessing
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, einsum, nn

import xprune
from xprune.testing import perturb, random_plan


@dataclass(frozen=True)
class Own:
    """A model and what a perfect tool would find in it.

    Attributes:
        build: Returns the model and its example inputs.
        heads: The number of heads of each attention, in the order of the model. Where several query heads share a key
            head, the number of key heads. An attention is not in the list if smaller tensors and other sizes in its
            forward are not enough to remove a head.
        mlps: The number of MLPs.
        others: The number of other places with hidden features. A tool may find them too, but nobody expects it. An
            example is the latent of a low-rank projection.
        note: Why the numbers are as they are, where this is not plain.
    """

    build: Callable[[], tuple[nn.Module, Any]]
    heads: tuple[int, ...]
    mlps: int
    others: int = 0
    note: str = ""


ZOO: dict[str, Own] = {}
"""Name -> a model and what a perfect tool would find in it."""

Builder = Callable[[], tuple[nn.Module, Any]]


def own(heads: tuple[int, ...] = (), mlps: int = 0, others: int = 0, note: str = "") -> Callable[[Builder], Builder]:
    """Returns a decorator that adds the function to `ZOO` under its name. The arguments are those of `Own`."""

    def add(build: Builder) -> Builder:
        ZOO[build.__name__] = Own(build, heads, mlps, others, note)
        return build

    return add


def build(name: str) -> tuple[nn.Module, Any]:
    """Returns a model in eval mode with random weights, and its example inputs. They are the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = ZOO[name].build()
    return perturb(model), inputs


def tokens(vocabulary: int = 50, length: int = 9) -> Tensor:
    return torch.randint(0, vocabulary, (2, length))


def pictures(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


# nanoGPT: one fused layer, the head size is computed from the width of the input.


@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 50
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    dropout: float = 0.1
    bias: bool = True


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        mask = torch.tril(torch.ones(config.block_size, config.block_size))
        self.register_buffer("bias", mask.view(1, 1, config.block_size, config.block_size))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.attn_dropout(att)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class GPTMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        return self.dropout(x)


class GPTBlock(nn.Module):
    def __init__(self, config, attention=CausalSelfAttention, mlp=GPTMLP):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = mlp(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config, block=GPTBlock):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        _, t = idx.size()
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


@own(heads=(4, 4), mlps=2)
def nanogpt():
    return GPT(GPTConfig()), tokens()


class FlashCausalSelfAttention(nn.Module):
    """Like nanoGPT's, but with the head size as an attribute, and torch's attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


@own(heads=(4, 4), mlps=2)
def gpt_flash():
    return GPT(GPTConfig(bias=False), partial(GPTBlock, attention=FlashCausalSelfAttention)), tokens()


# minGPT: key, query and value layers, an MLP as nn.Sequential.


class MinGPTSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head, block_size, attn_pdrop=0.1, resid_pdrop=0.1):
        super().__init__()
        self.key = nn.Linear(n_embd, n_embd)
        self.query = nn.Linear(n_embd, n_embd)
        self.value = nn.Linear(n_embd, n_embd)
        self.attn_drop = nn.Dropout(attn_pdrop)
        self.resid_drop = nn.Dropout(resid_pdrop)
        self.proj = nn.Linear(n_embd, n_embd)
        self.register_buffer("mask", torch.tril(torch.ones(block_size, block_size))[None, None])
        self.n_head = n_head

    def forward(self, x, layer_past=None):
        B, T, C = x.size()
        k = self.key(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = self.query(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = self.value(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_drop(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_drop(self.proj(y))


class MinGPTBlock(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        self.attn = MinGPTSelfAttention(n_embd, n_head, block_size)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(0.1)
        )

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        x = x + self.mlp(self.ln2(x))
        return x


class MinGPT(nn.Module):
    def __init__(self, vocab=50, n_embd=24, n_head=3, block_size=16, n_layer=2, block=MinGPTBlock):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab, n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, n_embd))
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*[block(n_embd, n_head, block_size) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab, bias=False)

    def forward(self, idx):
        x = self.drop(self.tok_emb(idx) + self.pos_emb[:, : idx.size(1), :])
        return self.head(self.ln_f(self.blocks(x)))


@own(heads=(3, 3), mlps=2)
def mingpt():
    return MinGPT(), tokens()


class MinGPTLambdaBlock(nn.Module):
    """The block of minGPT's later versions."""

    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = MinGPTSelfAttention(n_embd, n_head, block_size)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.ModuleDict(
            dict(c_fc=nn.Linear(n_embd, 4 * n_embd), c_proj=nn.Linear(4 * n_embd, n_embd), act=nn.GELU())
        )
        m = self.mlp
        self.mlpf = lambda x: m.c_proj(m.act(m.c_fc(x)))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


@own(heads=(3, 3), mlps=0, note="a copy of the model still calls the layers of the MLPs of the original")
def mingpt_lambda():
    return MinGPT(block=MinGPTLambdaBlock), tokens()


# A copy of timm's ViT under other names.


class ViTAttn(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        x = self.proj(x)
        x = self.proj_drop(x)
        return x


class ViTMlp(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class ViTBlock(nn.Module):
    def __init__(self, dim, num_heads, attn=None, mlp=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = (attn or partial(ViTAttn, qkv_bias=True))(dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim) if mlp else ViTMlp(dim, int(dim * 2.5))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ViT(nn.Module):
    """Images in, logits of classes out. Other models of this file use it with other attentions and MLPs."""

    def __init__(self, dim=32, heads=4, depth=2, classes=7, attn=None, mlp=None, size=16, patch=4):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList([ViTBlock(dim, heads, attn, mlp) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for blk in self.blocks:
            x = blk(x)
        return self.head(self.norm(x)[:, 0])


@own(heads=(4, 4), mlps=2)
def timm_copy():
    return ViT(), pictures()


# ViT in the style of vit-pytorch.


def pair(t):
    return t if isinstance(t, tuple) else (t, t)


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


class Attention(nn.Module):
    def __init__(self, dim, heads=8, dim_head=64, dropout=0.0):
        super().__init__()
        inner_dim = dim_head * heads
        project_out = not (heads == 1 and dim_head == dim)
        self.heads = heads
        self.scale = dim_head**-0.5
        self.norm = nn.LayerNorm(dim)
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.to_qkv = nn.Linear(dim, inner_dim * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, dim), nn.Dropout(dropout)) if project_out else nn.Identity()

    def forward(self, x):
        x = self.norm(x)
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in qkv)
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        attn = self.attend(dots)
        attn = self.dropout(attn)
        out = torch.matmul(attn, v)
        out = rearrange(out, "b h n d -> b n (h d)")
        return self.to_out(out)


class Transformer(nn.Module):
    def __init__(self, dim, depth, heads, dim_head, mlp_dim, dropout=0.0, attention=Attention, ff=FeedForward):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            self.layers.append(
                nn.ModuleList(
                    [
                        attention(dim, heads=heads, dim_head=dim_head, dropout=dropout),
                        ff(dim, mlp_dim, dropout=dropout),
                    ]
                )
            )

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.norm(x)


class LucidViT(nn.Module):
    def __init__(self, *, image_size=16, patch_size=4, num_classes=7, dim=24, depth=2, heads=3, mlp_dim=40, **options):
        super().__init__()
        image_height, image_width = pair(image_size)
        patch_height, patch_width = pair(patch_size)
        num_patches = (image_height // patch_height) * (image_width // patch_width)
        patch_dim = 3 * patch_height * patch_width
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=patch_height, p2=patch_width),
            nn.LayerNorm(patch_dim),
            nn.Linear(patch_dim, dim),
            nn.LayerNorm(dim),
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, num_patches + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(0.1)
        self.transformer = Transformer(dim, depth, heads, options.pop("dim_head", 8), mlp_dim, 0.1, **options)
        self.to_latent = nn.Identity()
        self.mlp_head = nn.Linear(dim, num_classes)

    def forward(self, img):
        x = self.to_patch_embedding(img)
        b, n, _ = x.shape
        cls_tokens = repeat(self.cls_token, "1 1 d -> b 1 d", b=b)
        x = torch.cat((cls_tokens, x), dim=1)
        x += self.pos_embedding[:, : (n + 1)]
        x = self.dropout(x)
        x = self.transformer(x)
        return self.mlp_head(self.to_latent(x[:, 0]))


@own(heads=(3, 3), mlps=2)
def lucid_vit():
    return LucidViT(dim_head=6), pictures()


class RearrangeAttention(nn.Module):
    """Its heads are only in layers of einops."""

    def __init__(self, dim, heads=4, dim_head=8, dropout=0.0):
        super().__init__()
        self.scale = dim_head**-0.5
        self.to_qkv = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, heads * dim_head * 3, bias=False),
            Rearrange("b n (qkv h d) -> qkv b h n d", qkv=3, h=heads),
        )
        self.to_out = nn.Sequential(
            Rearrange("b h n d -> b n (h d)"), nn.Linear(heads * dim_head, dim), nn.Dropout(dropout)
        )

    def forward(self, x):
        q, k, v = self.to_qkv(x)
        attn = (q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1)
        return self.to_out(attn @ v)


@own(heads=(4, 4), mlps=2)
def einops_layers():
    return LucidViT(heads=4, attention=RearrangeAttention), pictures()


# Bare parameters and einsum, as in ports from JAX.


class EinsumAttention(nn.Module):
    def __init__(self, features, num_heads, head_dim):
        super().__init__()
        self.Wq = nn.Parameter(torch.randn(num_heads, features, head_dim) * features**-0.5)
        self.Wk = nn.Parameter(torch.randn(num_heads, features, head_dim) * features**-0.5)
        self.Wv = nn.Parameter(torch.randn(num_heads, features, head_dim) * features**-0.5)
        self.Wo = nn.Parameter(torch.randn(num_heads, head_dim, features) * (num_heads * head_dim) ** -0.5)
        self.bo = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        q = torch.einsum("bnd,hdk->bhnk", x, self.Wq)
        k = torch.einsum("bnd,hdk->bhnk", x, self.Wk)
        v = torch.einsum("bnd,hdk->bhnk", x, self.Wv)
        scores = torch.einsum("bhqk,bhmk->bhqm", q, k) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.einsum("bhqm,bhmk->bhqk", weights, v)
        return torch.einsum("bhqk,hkd->bqd", mixed, self.Wo) + self.bo


class EinsumMLP(nn.Module):
    def __init__(self, features, hidden):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(features, hidden) * features**-0.5)
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.randn(hidden, features) * hidden**-0.5)
        self.b2 = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        h = F.gelu(torch.einsum("bnd,df->bnf", x, self.w1) + self.b1)
        return torch.einsum("bnf,fd->bnd", h, self.w2) + self.b2


class EinsumTransformer(nn.Module):
    def __init__(self, vocab=40, features=24, heads=3, layers=2):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(vocab, features) * 0.2)
        self.norms = nn.ModuleList([nn.LayerNorm(features) for _ in range(2 * layers)])
        self.attns = nn.ModuleList([EinsumAttention(features, heads, 10) for _ in range(layers)])
        self.mlps = nn.ModuleList([EinsumMLP(features, 36) for _ in range(layers)])
        self.unembed = nn.Parameter(torch.randn(features, vocab) * 0.2)

    def forward(self, ids):
        x = self.embed[ids]
        for i, (attn, mlp) in enumerate(zip(self.attns, self.mlps, strict=True)):
            x = x + attn(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return x @ self.unembed


@own(heads=(3, 3), mlps=2)
def einsum_parameters():
    return EinsumTransformer(), tokens(40)


# The annotated transformer: encoder and decoder.


def clones(module, N):
    "Produce N identical layers."
    return nn.ModuleList([copy.deepcopy(module) for _ in range(N)])


def subsequent_mask(size):
    return torch.triu(torch.ones(1, size, size), diagonal=1).type(torch.uint8) == 0


def attention(query, key, value, mask=None, dropout=None):
    "Compute 'Scaled Dot Product Attention'"
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = scores.softmax(dim=-1)
    if dropout is not None:
        p_attn = dropout(p_attn)
    return torch.matmul(p_attn, value), p_attn


class MultiHeadedAttention(nn.Module):
    def __init__(self, h, d_model, dropout=0.1):
        super().__init__()
        assert d_model % h == 0
        self.d_k = d_model // h
        self.h = h
        self.linears = clones(nn.Linear(d_model, d_model), 4)
        self.attn = None
        self.dropout = nn.Dropout(p=dropout)

    def forward(self, query, key, value, mask=None):
        if mask is not None:
            mask = mask.unsqueeze(1)
        nbatches = query.size(0)
        query, key, value = [
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        ]
        x, self.attn = attention(query, key, value, mask=mask, dropout=self.dropout)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        return self.linears[-1](x)


class PositionwiseFeedForward(nn.Module):
    def __init__(self, d_model, d_ff, dropout=0.1):
        super().__init__()
        self.w_1 = nn.Linear(d_model, d_ff)
        self.w_2 = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.w_2(self.dropout(self.w_1(x).relu()))


class SublayerConnection(nn.Module):
    def __init__(self, size, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, sublayer):
        return x + self.dropout(sublayer(self.norm(x)))


class EncoderLayer(nn.Module):
    def __init__(self, size, self_attn, feed_forward, dropout):
        super().__init__()
        self.self_attn = self_attn
        self.feed_forward = feed_forward
        self.sublayer = clones(SublayerConnection(size, dropout), 2)

    def forward(self, x, mask):
        x = self.sublayer[0](x, lambda x: self.self_attn(x, x, x, mask))
        return self.sublayer[1](x, self.feed_forward)


class DecoderLayer(nn.Module):
    def __init__(self, size, self_attn, src_attn, feed_forward, dropout):
        super().__init__()
        self.self_attn = self_attn
        self.src_attn = src_attn
        self.feed_forward = feed_forward
        self.sublayer = clones(SublayerConnection(size, dropout), 3)

    def forward(self, x, memory, src_mask, tgt_mask):
        m = memory
        x = self.sublayer[0](x, lambda x: self.self_attn(x, x, x, tgt_mask))
        x = self.sublayer[1](x, lambda x: self.src_attn(x, m, m, src_mask))
        return self.sublayer[2](x, self.feed_forward)


class EncoderDecoder(nn.Module):
    def __init__(self, vocab=40, N=2, d_model=24, d_ff=40, h=3, dropout=0.1):
        super().__init__()
        c = copy.deepcopy
        attn = MultiHeadedAttention(h, d_model)
        ff = PositionwiseFeedForward(d_model, d_ff, dropout)
        self.encoder = clones(EncoderLayer(d_model, c(attn), c(ff), dropout), N)
        self.decoder = clones(DecoderLayer(d_model, c(attn), c(attn), c(ff), dropout), N)
        self.norms = clones(nn.LayerNorm(d_model), 2)
        self.embeds = clones(nn.Embedding(vocab, d_model), 2)
        self.generator = nn.Linear(d_model, vocab)

    def forward(self, src, tgt):
        memory = self.embeds[0](src)
        for layer in self.encoder:
            memory = layer(memory, None)
        memory = self.norms[0](memory)
        x, tgt_mask = self.embeds[1](tgt), subsequent_mask(tgt.size(1))
        for layer in self.decoder:
            x = layer(x, memory, None, tgt_mask)
        return F.log_softmax(self.generator(self.norms[1](x)), dim=-1)


@own(heads=(3,) * 6, mlps=4)
def annotated_transformer():
    return EncoderDecoder(), (tokens(40, 7), tokens(40, 5))


# The lecture on GPT from scratch: one module for each head.


class Head(nn.Module):
    """one head of self-attention"""

    def __init__(self, head_size, n_embd, block_size, dropout):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        _, T, _ = x.shape
        k = self.key(x)  # (B,T,hs)
        q = self.query(x)  # (B,T,hs)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        wei = F.softmax(wei, dim=-1)
        wei = self.dropout(wei)
        return wei @ self.value(x)


class MultiHeadAttention(nn.Module):
    """multiple heads of self-attention in parallel"""

    def __init__(self, num_heads, head_size, n_embd, block_size, dropout):
        super().__init__()
        self.heads = nn.ModuleList([Head(head_size, n_embd, block_size, dropout) for _ in range(num_heads)])
        self.proj = nn.Linear(head_size * num_heads, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        out = torch.cat([h(x) for h in self.heads], dim=-1)
        return self.dropout(self.proj(out))


class LectureFeedForward(nn.Module):
    """a simple linear layer followed by a non-linearity"""

    def __init__(self, n_embd, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout)
        )

    def forward(self, x):
        return self.net(x)


class LectureBlock(nn.Module):
    def __init__(self, n_embd, n_head, block_size, dropout):
        super().__init__()
        head_size = n_embd // n_head
        self.sa = MultiHeadAttention(n_head, head_size, n_embd, block_size, dropout)
        self.ffwd = LectureFeedForward(n_embd, dropout)
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        x = x + self.ffwd(self.ln2(x))
        return x


class GPTLanguageModel(nn.Module):
    def __init__(self, vocab_size=65, n_embd=24, n_head=4, block_size=16, dropout=0.2):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*[LectureBlock(n_embd, n_head, block_size, dropout) for _ in range(2)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, targets=None):
        _, T = idx.shape
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(T, device=idx.device))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@own(heads=(4, 4), mlps=2)
def lecture_gpt():
    return GPTLanguageModel(), tokens(65)


# Attentions of convolutions.


class SelfAttn(nn.Module):
    """Self attention layer of SAGAN, one head."""

    def __init__(self, in_dim):
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_dim, in_dim // 2, kernel_size=1)
        self.out_conv = nn.Conv2d(in_dim // 2, in_dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        b, _, width, height = x.size()
        proj_query = self.query_conv(x).view(b, -1, width * height).permute(0, 2, 1)
        proj_key = self.key_conv(x).view(b, -1, width * height)
        attention = self.softmax(torch.bmm(proj_query, proj_key))
        proj_value = self.value_conv(x).view(b, -1, width * height)
        out = torch.bmm(proj_value, attention.permute(0, 2, 1)).view(b, -1, width, height)
        return self.gamma * self.out_conv(out) + x


class Discriminator(nn.Module):
    def __init__(self, ch=24):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.1))
        self.attn1 = SelfAttn(ch)
        self.down = nn.Sequential(nn.Conv2d(ch, ch, 4, 2, 1), nn.LeakyReLU(0.1))
        self.attn2 = SelfAttn(ch)
        self.last = nn.Conv2d(ch, 1, 4)

    def forward(self, x):
        x = self.attn1(self.stem(x))
        x = self.attn2(self.down(x))
        return self.last(x).flatten(1)


@own(heads=(), mlps=0, others=2, note="one head each: only the values' features can be removed, as hidden features")
def sagan():
    return Discriminator(), pictures()


class MDTA(nn.Module):
    """Attention between channels, as in Restormer."""

    def __init__(self, dim, num_heads, bias=False):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, kernel_size=1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, kernel_size=3, padding=1, groups=dim * 3, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, kernel_size=1, bias=bias)

    def forward(self, x):
        _, _, h, w = x.shape
        q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        q = rearrange(q, "b (head c) h w -> b head c (h w)", head=self.num_heads)
        k = rearrange(k, "b (head c) h w -> b head c (h w)", head=self.num_heads)
        v = rearrange(v, "b (head c) h w -> b head c (h w)", head=self.num_heads)
        q = F.normalize(q, dim=-1)
        k = F.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1)) * self.temperature
        out = attn.softmax(dim=-1) @ v
        out = rearrange(out, "b head c (h w) -> b (head c) h w", head=self.num_heads, h=h, w=w)
        return self.project_out(out)


class GDFN(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.project_in = nn.Conv2d(dim, hidden * 2, kernel_size=1, bias=False)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, kernel_size=1, bias=False)

    def forward(self, x):
        x1, x2 = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(x1) * x2)


class ChannelLayerNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias).permute(0, 3, 1, 2)


class Restorer(nn.Module):
    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 3, padding=1)
        self.norms = nn.ModuleList([ChannelLayerNorm(dim) for _ in range(4)])
        self.attns = nn.ModuleList([MDTA(dim, heads) for _ in range(2)])
        self.ffns = nn.ModuleList([GDFN(dim, 30) for _ in range(2)])
        self.output = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, inp):
        x = self.patch_embed(inp)
        for i in range(2):
            x = x + self.attns[i](self.norms[2 * i](x))
            x = x + self.ffns[i](self.norms[2 * i + 1](x))
        return self.output(x) + inp


@own(heads=(3, 3), mlps=2)
def restormer():
    return Restorer(), pictures(8)


class ConvAttention2d(nn.Module):
    """1x1 convolutions, rows of a head side by side, as in CoAtNet."""

    def __init__(self, dim, dim_head=8, bias=True):
        super().__init__()
        self.num_heads = dim // dim_head
        self.dim_head = dim_head
        self.scale = dim_head**-0.5
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=bias)
        self.proj = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x):
        B, _, H, W = x.shape
        q, k, v = self.qkv(x).view(B, self.num_heads, self.dim_head * 3, -1).chunk(3, dim=2)
        attn = (q.transpose(-2, -1) @ k) * self.scale
        attn = attn.softmax(dim=-1)
        x = (v @ attn.transpose(-2, -1)).view(B, -1, H, W)
        return self.proj(x)


class MBConv(nn.Module):
    def __init__(self, dim, expand=2):
        super().__init__()
        mid = dim * expand
        self.layers = nn.Sequential(
            nn.BatchNorm2d(dim),
            nn.Conv2d(dim, mid, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.GELU(),
            nn.Conv2d(mid, mid, 3, padding=1, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
            nn.GELU(),
            nn.Conv2d(mid, dim, 1),
        )

    def forward(self, x):
        return x + self.layers(x)


class CoAttentionNet(nn.Module):
    def __init__(self, dim=32, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, 2, 1)
        self.conv = MBConv(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn1 = ConvAttention2d(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.attn2 = ConvAttention2d(dim)
        self.fc = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.conv(self.stem(x))
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x))
        return self.fc(x.mean((2, 3)))


@own(heads=(4, 4), mlps=1)
def conv_attention():
    return CoAttentionNet(), pictures(12)


class NonLocalMHSA(nn.Module):
    """Three convolutions, images are flattened in the forward."""

    def __init__(self, n_dims, heads=4):
        super().__init__()
        self.heads = heads
        self.query = nn.Conv2d(n_dims, n_dims, kernel_size=1)
        self.key = nn.Conv2d(n_dims, n_dims, kernel_size=1)
        self.value = nn.Conv2d(n_dims, n_dims, kernel_size=1)
        self.out = nn.Conv2d(n_dims, n_dims, kernel_size=1)

    def forward(self, x):
        n, c, h, w = x.size()
        q = self.query(x).flatten(2).view(n, self.heads, c // self.heads, -1)
        k = self.key(x).flatten(2).view(n, self.heads, c // self.heads, -1)
        v = self.value(x).flatten(2).view(n, self.heads, c // self.heads, -1)
        energy = torch.matmul(q.permute(0, 1, 3, 2), k) / (c // self.heads) ** 0.5
        out = torch.matmul(v, torch.softmax(energy, dim=-1).permute(0, 1, 3, 2))
        return self.out(out.view(n, c, h, w))


class BottleneckNet(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.bn1, self.bn2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)
        self.mhsa1, self.mhsa2 = NonLocalMHSA(dim), NonLocalMHSA(dim)
        self.fc = nn.Linear(dim, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = x + self.mhsa1(x)
        x = x + self.mhsa2(self.bn2(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@own(heads=(4, 4), mlps=0)
def conv_q_k_v():
    return BottleneckNet(), pictures()


# A UNet of guided diffusion.


def zero_module(module):
    for p in module.parameters():
        p.detach().zero_()
    return module


class QKVAttentionLegacy(nn.Module):
    """A module which performs QKV attention. Matches legacy QKVAttention + input/ouput heads shaping"""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        bs, width, length = qkv.shape
        assert width % (3 * self.n_heads) == 0
        ch = width // (3 * self.n_heads)
        q, k, v = qkv.reshape(bs * self.n_heads, ch * 3, length).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        a = torch.einsum("bts,bcs->bct", weight, v)
        return a.reshape(bs, -1, length)


class AttentionBlock(nn.Module):
    def __init__(self, channels, num_heads=1):
        super().__init__()
        self.channels = channels
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.attention = QKVAttentionLegacy(self.num_heads)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        h = self.attention(qkv)
        h = self.proj_out(h)
        return (x + h).reshape(b, c, *spatial)


class ResBlock(nn.Module):
    def __init__(self, channels, emb_channels):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Dropout(0.1),
            zero_module(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x, emb):
        h = self.in_layers(x)
        h = h + self.emb_layers(emb)[:, :, None, None]
        return x + self.out_layers(h)


def timestep_embedding(timesteps, dim, max_period=10000):
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(0, half, dtype=torch.float32) / half)
    args = timesteps[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class UNetModel(nn.Module):
    def __init__(self, ch=24, heads=3):
        super().__init__()
        self.ch = ch
        self.time_embed = nn.Sequential(nn.Linear(ch, ch * 2), nn.SiLU(), nn.Linear(ch * 2, ch * 2))
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.res1, self.attn1 = ResBlock(ch, ch * 2), AttentionBlock(ch, heads)
        self.down = nn.Conv2d(ch, ch, 3, 2, 1)
        self.res2, self.attn2 = ResBlock(ch, ch * 2), AttentionBlock(ch, heads)
        self.out = nn.Sequential(nn.GroupNorm(8, ch), nn.SiLU(), zero_module(nn.Conv2d(ch, 3, 3, padding=1)))

    def forward(self, x, timesteps):
        emb = self.time_embed(timestep_embedding(timesteps, self.ch))
        h0 = self.attn1(self.res1(self.conv_in(x), emb))
        h = self.attn2(self.res2(self.down(h0), emb))
        return self.out(h0 + F.interpolate(h, scale_factor=2.0, mode="nearest"))


@own(heads=(3, 3), mlps=1, others=3, note="others: the residual blocks of convolutions, with group norms inside")
def guided_diffusion():
    return UNetModel(), (pictures(8), torch.tensor([3, 250]))


# Language models with rotary positions.


def precompute_freqs_cis(dim, end, theta=10000.0):
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    freqs = torch.outer(torch.arange(end).float(), freqs)
    return torch.polar(torch.ones_like(freqs), freqs)  # complex64


def apply_rotary_emb(xq, xk, freqs_cis):
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = freqs_cis.view(1, xq_.shape[1], 1, xq_.shape[-1])
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)


def repeat_kv(x, n_rep):
    """torch.repeat_interleave(x, dim=2, repeats=n_rep)"""
    bs, slen, n_kv_heads, head_dim = x.shape
    if n_rep == 1:
        return x
    return (
        x[:, :, :, None, :]
        .expand(bs, slen, n_kv_heads, n_rep, head_dim)
        .reshape(bs, slen, n_kv_heads * n_rep, head_dim)
    )


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


@dataclass
class ModelArgs:
    dim: int = 32
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = 2
    vocab_size: int = 50
    hidden_dim: int = 44
    norm_eps: float = 1e-5
    max_seq_len: int = 16


class LlamaSelfAttention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_kv_heads = args.n_heads if args.n_kv_heads is None else args.n_kv_heads
        self.n_heads_q = args.n_heads
        self.n_rep = self.n_heads_q // self.n_kv_heads
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim, bias=False)

    def forward(self, x, freqs_cis, mask):
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(bsz, seqlen, self.n_heads_q, self.head_dim)
        xk = xk.view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xv = xv.view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)
        keys = repeat_kv(xk, self.n_rep).transpose(1, 2)
        values = repeat_kv(xv, self.n_rep).transpose(1, 2)
        scores = torch.matmul(xq.transpose(1, 2), keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = F.softmax((scores + mask).float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(output)


class LlamaFeedForward(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, args, attention, feed_forward):
        super().__init__()
        self.attention = attention(args)
        self.feed_forward = feed_forward(args)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x, freqs_cis, mask):
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(nn.Module):
    def __init__(self, args, attention=LlamaSelfAttention, feed_forward=LlamaFeedForward, rope_dim=None):
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList([LlamaBlock(args, attention, feed_forward) for _ in range(args.n_layers)])
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        freqs_cis = precompute_freqs_cis(rope_dim or args.dim // args.n_heads, args.max_seq_len * 2)
        self.register_buffer("freqs_cis", freqs_cis, persistent=False)

    def forward(self, tokens):
        _, seqlen = tokens.shape
        h = self.tok_embeddings(tokens)
        mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device).triu(diagonal=1)
        for layer in self.layers:
            h = layer(h, self.freqs_cis[:seqlen], mask)
        return self.output(self.norm(h)).float()


@own(heads=(2, 2), mlps=2)
def llama_scratch():
    return Llama(ModelArgs()), tokens()


class GQAWithFlag(nn.Module):
    """Lets torch share the keys."""

    def __init__(self, args):
        super().__init__()
        self.nh, self.nkv, self.hd = args.n_heads, args.n_kv_heads, args.dim // args.n_heads
        self.qkv = nn.Linear(args.dim, (self.nh + 2 * self.nkv) * self.hd, bias=False)
        self.out = nn.Linear(self.nh * self.hd, args.dim, bias=False)

    def forward(self, x, freqs_cis, mask):
        q, k, v = self.qkv(x).split([self.nh * self.hd, self.nkv * self.hd, self.nkv * self.hd], dim=-1)
        q, k = q.unflatten(-1, (self.nh, self.hd)), k.unflatten(-1, (self.nkv, self.hd))
        v = v.unflatten(-1, (self.nkv, self.hd)).transpose(1, 2)
        q, k = apply_rotary_emb(q, k, freqs_cis)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


@own(heads=(2, 2), mlps=2)
def sdpa_enable_gqa():
    return Llama(ModelArgs(), GQAWithFlag), tokens()


class MultiQuery(nn.Module):
    """All query heads read the same key and value."""

    def __init__(self, args):
        super().__init__()
        self.n_heads = args.n_heads
        self.d_head = args.dim // args.n_heads
        self.q_proj = nn.Linear(args.dim, args.dim)
        self.kv_proj = nn.Linear(args.dim, 2 * self.d_head)
        self.o_proj = nn.Linear(args.dim, args.dim)

    def forward(self, x, freqs_cis, mask):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.n_heads, self.d_head).permute(0, 2, 1, 3)
        k, v = self.kv_proj(x).chunk(2, dim=-1)
        att = torch.einsum("bhtd,bsd->bhts", q, k) * self.d_head**-0.5 + mask
        out = torch.einsum("bhts,bsd->bthd", att.softmax(-1), v)
        return self.o_proj(out.reshape(b, t, self.n_heads * self.d_head))


@own(heads=(4, 4), mlps=2)
def multi_query():
    return Llama(ModelArgs(), MultiQuery), tokens()


class HeadNormAttention(nn.Module):
    """Norms of queries and keys over each head, one weight for all heads."""

    def __init__(self, args):
        super().__init__()
        self.num_heads = args.n_heads
        self.head_dim = args.dim // args.n_heads
        self.q_proj = nn.Linear(args.dim, args.dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.dim, bias=False)
        self.o_proj = nn.Linear(args.dim, args.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(self, x, freqs_cis, mask):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape))
        k = self.k_norm(self.k_proj(x).view(shape))
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = apply_rotary_emb(q, k, freqs_cis)
        attn = q.transpose(1, 2) @ k.transpose(1, 2).mT * self.head_dim**-0.5 + mask
        out = attn.softmax(dim=-1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:-1], -1))


@own(heads=(4, 4), mlps=2)
def qk_norm_of_heads():
    return Llama(ModelArgs(), HeadNormAttention), tokens()


class FullNormAttention(nn.Module):
    """Norms of queries and keys over all heads at once."""

    def __init__(self, args):
        super().__init__()
        self.num_heads = args.n_heads
        self.head_dim = args.dim // args.n_heads
        self.wqkv = nn.ModuleDict({n: nn.Linear(args.dim, args.dim, bias=False) for n in ("q", "k", "v")})
        self.q_norm = nn.RMSNorm(args.dim)
        self.k_norm = nn.RMSNorm(args.dim)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, freqs_cis, mask):
        B, T, _ = x.shape
        q = self.q_norm(self.wqkv["q"](x)).view(B, T, self.num_heads, self.head_dim)
        k = self.k_norm(self.wqkv["k"](x)).view(B, T, self.num_heads, self.head_dim)
        v = self.wqkv["v"](x).view(B, T, self.num_heads, self.head_dim)
        q, k = apply_rotary_emb(q, k, freqs_cis)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


@own(heads=(4, 4), mlps=2, note="the norms' mean is over all heads: a gate has to count the kept heads only")
def qk_norm_full_width():
    return Llama(ModelArgs(), FullNormAttention), tokens()


class SinkAttention(nn.Module):
    """A learned logit for each head takes up attention that no token needs."""

    def __init__(self, args):
        super().__init__()
        self.num_attention_heads = args.n_heads
        self.num_key_value_heads = args.n_kv_heads
        self.head_dim = args.dim // args.n_heads
        self.sinks = nn.Parameter(torch.randn(args.n_heads))
        self.qkv = nn.Linear(args.dim, self.head_dim * (args.n_heads + 2 * args.n_kv_heads))
        self.out = nn.Linear(self.head_dim * args.n_heads, args.dim)
        self.sm_scale = self.head_dim**-0.5

    def forward(self, x, freqs_cis, mask):
        B, T, _ = x.shape
        qkv = self.qkv(x)
        nq, nk = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        q = qkv[..., :nq].reshape(B, T, self.num_attention_heads, self.head_dim)
        k = qkv[..., nq : nq + nk].reshape(B, T, self.num_key_value_heads, self.head_dim)
        v = qkv[..., nq + nk :].reshape(B, T, self.num_key_value_heads, self.head_dim)
        q, k = apply_rotary_emb(q, k, freqs_cis)
        groups = self.num_attention_heads // self.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        QK = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.sm_scale + mask
        S = self.sinks.reshape(1, -1, 1, 1).expand(B, -1, T, -1)
        W = torch.softmax(torch.cat([QK, S], dim=-1), dim=-1)[..., :-1]
        attn = torch.einsum("bhqk,bkhd->bqhd", W, v)
        return self.out(attn.reshape(B, T, -1))


@own(heads=(2, 2), mlps=2)
def attention_sinks():
    return Llama(ModelArgs(), SinkAttention), tokens()


class GatedAttention(nn.Module):
    """A sigmoid gate for each feature of each head, before the output projection."""

    def __init__(self, args):
        super().__init__()
        self.H = args.n_heads
        self.to_q = nn.Linear(args.dim, args.dim, bias=False)
        self.to_kv = nn.Linear(args.dim, 2 * args.dim, bias=False)
        self.to_gates = nn.Linear(args.dim, args.dim)
        self.to_out = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, freqs_cis, mask):
        q, (k, v) = self.to_q(x), self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.H) for t in (q, k, v))
        sim = einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
        out = einsum("b h i j, b h j d -> b h i d", (sim + mask).softmax(dim=-1), v)
        out = rearrange(out, "b h n d -> b n (h d)")
        return self.to_out(out * self.to_gates(x).sigmoid())


@own(heads=(4, 4), mlps=2)
def gated_attention():
    return Llama(ModelArgs(), GatedAttention), tokens()


class HeadGatedAttention(nn.Module):
    """One sigmoid gate for each head, from a small linear layer."""

    def __init__(self, args):
        super().__init__()
        self.n_heads, self.head_dim = args.n_heads, args.dim // args.n_heads
        self.qkv = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.gate = nn.Linear(args.dim, args.n_heads)
        self.proj = nn.Linear(args.dim, args.dim)

    def forward(self, x, freqs_cis, mask):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, self.head_dim).unbind(2)
        q, k = apply_rotary_emb(q, k, freqs_cis)
        att = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(self.head_dim)
        y = torch.einsum("bhts,bshd->bthd", (att + mask).softmax(-1), v)
        y = y * torch.sigmoid(self.gate(x)).unsqueeze(-1)
        return self.proj(y.flatten(2))


@own(heads=(4, 4), mlps=2)
def gate_of_each_head():
    return Llama(ModelArgs(), HeadGatedAttention), tokens()


class DiffAttention(nn.Module):
    """Differential attention: each head subtracts a second softmax map from its first."""

    def __init__(self, args, lambda_init=0.5):
        super().__init__()
        self.num_heads = args.n_heads
        self.head_dim = args.dim // args.n_heads // 2
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(args.dim, args.dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.dim, bias=False)
        self.out_proj = nn.Linear(args.dim, args.dim, bias=False)
        self.lambda_init = lambda_init
        self.lambda_q1 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.lambda_k1 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.lambda_q2 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.lambda_k2 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.subln = RMSNorm(2 * self.head_dim, eps=1e-5)

    def forward(self, x, freqs_cis, mask):
        bsz, tgt_len, _ = x.size()
        q = self.q_proj(x).view(bsz, tgt_len, 2 * self.num_heads, self.head_dim)
        k = self.k_proj(x).view(bsz, tgt_len, 2 * self.num_heads, self.head_dim)
        v = self.v_proj(x).view(bsz, tgt_len, self.num_heads, 2 * self.head_dim).transpose(1, 2)
        q, k = apply_rotary_emb(q, k, freqs_cis)
        attn_weights = torch.matmul(q.transpose(1, 2) * self.scaling, k.transpose(1, 2).transpose(-1, -2)) + mask
        attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32)
        lambda_1 = torch.exp(torch.sum(self.lambda_q1 * self.lambda_k1, dim=-1))
        lambda_2 = torch.exp(torch.sum(self.lambda_q2 * self.lambda_k2, dim=-1))
        lambda_full = lambda_1 - lambda_2 + self.lambda_init
        attn_weights = attn_weights.view(bsz, self.num_heads, 2, tgt_len, tgt_len)
        attn_weights = attn_weights[:, :, 0] - lambda_full * attn_weights[:, :, 1]
        attn = self.subln(torch.matmul(attn_weights, v)) * (1 - self.lambda_init)
        return self.out_proj(attn.transpose(1, 2).reshape(bsz, tgt_len, self.num_heads * 2 * self.head_dim))


@own(heads=(4, 4), mlps=2)
def differential_attention():
    return Llama(ModelArgs(), DiffAttention, rope_dim=4), tokens()


class MLA(nn.Module):
    """Multi-head latent attention of DeepSeek: low-rank queries and keys, rotary features apart."""

    def __init__(self, args):
        super().__init__()
        self.n_local_heads = args.n_heads
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = 6, 4, 8
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.kv_lora_rank = 14
        self.wq_a = nn.Linear(args.dim, 18, bias=False)
        self.q_norm = RMSNorm(18)
        self.wq_b = nn.Linear(18, args.n_heads * self.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(args.dim, self.kv_lora_rank + self.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(self.kv_lora_rank)
        self.wkv_b = nn.Linear(self.kv_lora_rank, args.n_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.wo = nn.Linear(args.n_heads * self.v_head_dim, args.dim, bias=False)
        self.softmax_scale = self.qk_head_dim**-0.5

    def forward(self, x, freqs_cis, mask):
        bsz, seqlen, _ = x.size()
        q = self.wq_b(self.q_norm(self.wq_a(x)))
        q = q.view(bsz, seqlen, self.n_local_heads, self.qk_head_dim)
        q_nope, q_pe = torch.split(q, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        kv, k_pe = torch.split(self.wkv_a(x), [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        q_pe, k_pe = apply_rotary_emb(q_pe, k_pe.unsqueeze(2), freqs_cis)
        q = torch.cat([q_nope, q_pe], dim=-1)
        kv = self.wkv_b(self.kv_norm(kv))
        kv = kv.view(bsz, seqlen, self.n_local_heads, self.qk_nope_head_dim + self.v_head_dim)
        k_nope, v = torch.split(kv, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k = torch.cat([k_nope, k_pe.expand(-1, -1, self.n_local_heads, -1)], dim=-1)
        scores = torch.einsum("bshd,bthd->bsht", q, k) * self.softmax_scale
        scores = scores + mask.unsqueeze(1)
        x = torch.einsum("bsht,bthd->bshd", scores.softmax(dim=-1), v)
        return self.wo(x.flatten(2))


@own(heads=(4, 4), mlps=2, others=4, note="others: the latents of queries and keys")
def deepseek_mla():
    return Llama(ModelArgs(), MLA, rope_dim=4), tokens()


# PaLM: attention and MLP side by side, one fused projection.


class SwiGLU(nn.Module):
    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class ParallelTransformerBlock(nn.Module):
    def __init__(self, dim, dim_head=8, heads=4, ff_mult=2):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        attn_inner_dim = dim_head * heads
        ff_inner_dim = dim * ff_mult
        self.fused_dims = (attn_inner_dim, dim_head, dim_head, (ff_inner_dim * 2))
        self.heads = heads
        self.scale = dim_head**-0.5
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.fused_dims), bias=False)
        self.attn_out = nn.Linear(attn_inner_dim, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(ff_inner_dim, dim, bias=False))

    def forward(self, x):
        n, h = x.shape[1], self.heads
        x = self.norm(x)
        q, k, v, ff = self.fused_attn_ff_proj(x).split(self.fused_dims, dim=-1)
        q = rearrange(q, "b n (h d) -> b h n d", h=h) * self.scale
        sim = einsum("b h i d, b j d -> b h i j", q, k)
        causal_mask = torch.ones((n, n), device=x.device, dtype=torch.bool).triu(1)
        sim = sim.masked_fill(causal_mask, -torch.finfo(sim.dtype).max)
        out = einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v)
        out = rearrange(out, "b h n d -> b n (h d)")
        return self.attn_out(out) + self.ff_out(ff)


class PaLM(nn.Module):
    def __init__(self, num_tokens=50, dim=32, depth=2):
        super().__init__()
        self.emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList([ParallelTransformerBlock(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)
        self.to_logits.weight = self.emb.weight

    def forward(self, x):
        x = self.emb(x)
        for block in self.layers:
            x = x + block(x)
        return self.to_logits(self.norm(x))


@own(heads=(4, 4), mlps=2)
def palm_parallel():
    return PaLM(), tokens()


# Positions as biases.


def get_slopes(n):
    start = 2 ** (-(2 ** -(math.log2(n) - 3)))
    return [start * start**i for i in range(n)]


class AlibiBuffer(nn.Module):
    """The slopes are a buffer."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.n_head, config.n_embd // config.n_head
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.dense = nn.Linear(config.n_embd, config.n_embd)
        self.register_buffer("slopes", torch.tensor(get_slopes(config.n_head)).view(1, -1, 1, 1))

    def forward(self, x):
        b, t, _ = x.shape
        fused = self.query_key_value(x).view(b, t, self.num_heads, 3, self.head_dim)
        q, k, v = (fused[..., i, :].transpose(1, 2) for i in range(3))
        ahead = torch.arange(t)[None, :] - torch.arange(t)[:, None]
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim) + self.slopes * ahead
        scores = scores.masked_fill(ahead > 0, float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim)
        return self.dense(y)


@own(heads=(4, 4), mlps=2)
def alibi_buffer():
    return GPT(GPTConfig(), partial(GPTBlock, attention=AlibiBuffer)), tokens()


class AlibiList(nn.Module):
    """The slopes are a list of Python numbers."""

    def __init__(self, config):
        super().__init__()
        self.nheads, self.hdim = config.n_head, config.n_embd // config.n_head
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(config.n_embd, config.n_embd) for _ in range(4))
        self.slopes = get_slopes(config.n_head)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (w(x).view(b, t, self.nheads, self.hdim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        slopes = torch.tensor(self.slopes, device=x.device).view(-1, 1, 1)
        ahead = torch.arange(t)[None, :] - torch.arange(t)[:, None]
        mask = torch.where(ahead > 0, float("-inf"), slopes * ahead)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(y.transpose(1, 2).reshape(b, t, self.nheads * self.hdim))


@own(heads=(4, 4), mlps=2, note="a list with one number for each head has to lose numbers too")
def alibi_list():
    return GPT(GPTConfig(), partial(GPTBlock, attention=AlibiList)), tokens()


class AlibiInForward(nn.Module):
    """The slopes are computed from the number of heads at each call."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, _ = x.size()
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        q, k, v = (t.view(B, T, self.n_head, self.head_dim).transpose(1, 2) for t in (q, k, v))
        slopes = torch.tensor(get_slopes(self.n_head), device=x.device).view(-1, 1, 1)
        ahead = torch.arange(T)[None, :] - torch.arange(T)[:, None]
        att = (q @ k.mT) / self.head_dim**0.5 + slopes * ahead
        att = att.masked_fill(ahead > 0, float("-inf")).softmax(dim=-1)
        return self.c_proj((att @ v).transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


@own(heads=(), mlps=2, note="fewer heads give all heads other slopes")
def alibi_in_forward():
    return GPT(GPTConfig(), partial(GPTBlock, attention=AlibiInForward)), tokens()


class T5Attention(nn.Module):
    """The first layer computes the bias of positions and hands it on."""

    def __init__(self, d_model, d_kv, num_heads, has_relative_attention_bias=False):
        super().__init__()
        self.n_heads = num_heads
        self.key_value_proj_dim = d_kv
        self.inner_dim = num_heads * d_kv
        self.q = nn.Linear(d_model, self.inner_dim, bias=False)
        self.k = nn.Linear(d_model, self.inner_dim, bias=False)
        self.v = nn.Linear(d_model, self.inner_dim, bias=False)
        self.o = nn.Linear(self.inner_dim, d_model, bias=False)
        self.has_relative_attention_bias = has_relative_attention_bias
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(9, num_heads)

    def compute_bias(self, length):
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        return self.relative_attention_bias(distance.clamp(-4, 4) + 4).permute(2, 0, 1).unsqueeze(0)

    def forward(self, hidden_states, position_bias=None):
        batch_size, seq_length = hidden_states.shape[:2]

        def shape(states):
            return states.view(batch_size, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)

        query, key, value = (shape(layer(hidden_states)) for layer in (self.q, self.k, self.v))
        scores = torch.matmul(query, key.transpose(3, 2))
        if position_bias is None:
            position_bias = self.compute_bias(seq_length)
        attn = F.softmax(scores + position_bias, dim=-1)
        out = torch.matmul(attn, value).transpose(1, 2).contiguous().view(batch_size, -1, self.inner_dim)
        return self.o(out), position_bias


class T5Encoder(nn.Module):
    def __init__(self, vocab=40, d_model=24, layers=2):
        super().__init__()
        self.shared = nn.Embedding(vocab, d_model)
        self.attention = nn.ModuleList([T5Attention(d_model, 8, 4, i == 0) for i in range(layers)])
        self.attention_norm = nn.ModuleList([RMSNorm(d_model) for _ in range(layers)])
        self.wi = nn.ModuleList([nn.Linear(d_model, 50, bias=False) for _ in range(layers)])
        self.wo = nn.ModuleList([nn.Linear(50, d_model, bias=False) for _ in range(layers)])
        self.ff_norm = nn.ModuleList([RMSNorm(d_model) for _ in range(layers)])
        self.final = RMSNorm(d_model)

    def forward(self, ids):
        x, bias = self.shared(ids), None
        for i in range(len(self.attention)):
            out, bias = self.attention[i](self.attention_norm[i](x), position_bias=bias)
            x = x + out
            x = x + self.wo[i](F.relu(self.wi[i](self.ff_norm[i](x))))
        return self.final(x)


@own(heads=(4,), mlps=2, note="the bias ties the heads of both attentions: they are one site")
def t5_shared_bias():
    return T5Encoder(), tokens(40)


# Windows, temperatures, other maps.


def window_partition(x, window_size):
    B, H, W, C = x.shape
    x = x.view(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, C)


def window_reverse(windows, window_size, H, W):
    B = int(windows.shape[0] / (H * W / window_size / window_size))
    x = windows.view(B, H // window_size, W // window_size, window_size, window_size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowMSA(nn.Module):
    def __init__(self, dim, window_size, num_heads, qkv_bias=True):
        super().__init__()
        self.dim = dim
        self.window_size = (window_size, window_size)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        coords = torch.stack(torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij"))
        coords = torch.flatten(coords, 1)
        relative_coords = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
        relative_coords += window_size - 1
        relative_coords[:, :, 0] *= 2 * window_size - 1
        self.register_buffer("relative_position_index", relative_coords.sum(-1))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        x = (self.softmax(attn) @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


class ShiftBlock(nn.Module):
    def __init__(self, dim, resolution, num_heads, window_size=4, shift_size=0):
        super().__init__()
        self.input_resolution, self.window_size, self.shift_size = resolution, window_size, shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowMSA(dim, window_size, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ViTMlp(dim, dim * 2)
        attn_mask = None
        if shift_size > 0:
            img_mask = torch.zeros((1, resolution, resolution, 1))
            steps = (slice(0, -window_size), slice(-window_size, -shift_size), slice(-shift_size, None))
            for i, h in enumerate(steps):
                for j, w in enumerate(steps):
                    img_mask[:, h, w, :] = 3 * i + j
            mask_windows = window_partition(img_mask, window_size).view(-1, window_size**2)
            attn_mask = mask_windows.unsqueeze(1) - mask_windows.unsqueeze(2)
            attn_mask = attn_mask.masked_fill(attn_mask != 0, -100.0)
        self.register_buffer("attn_mask", attn_mask)

    def forward(self, x):
        H = W = self.input_resolution
        B, L, C = x.shape
        shortcut = x
        x = self.norm1(x).view(B, H, W, C)
        if self.shift_size > 0:
            x = torch.roll(x, shifts=(-self.shift_size, -self.shift_size), dims=(1, 2))
        windows = window_partition(x, self.window_size).view(-1, self.window_size**2, C)
        windows = self.attn(windows, mask=self.attn_mask).view(-1, self.window_size, self.window_size, C)
        x = window_reverse(windows, self.window_size, H, W)
        if self.shift_size > 0:
            x = torch.roll(x, shifts=(self.shift_size, self.shift_size), dims=(1, 2))
        x = shortcut + x.view(B, L, C)
        return x + self.mlp(self.norm2(x))


class WindowNet(nn.Module):
    def __init__(self, dim=24, heads=3, classes=6):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 2, 2)
        self.block1, self.block2 = ShiftBlock(dim, 8, heads), ShiftBlock(dim, 8, heads, shift_size=2)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)
        x = self.norm(self.block2(self.block1(x)))
        return self.head(x.transpose(1, 2).mean(-1))


@own(heads=(3, 3), mlps=2)
def swin_windows():
    return WindowNet(), pictures()


class CosineAttention(nn.Module):
    """Cosine similarity with a learned temperature for each head, as in Swin v2."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(num_heads, 1, 1)))
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, _ = x.shape
        q, k, v = (f(x).reshape(B, N, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, -1))


@own(heads=(4, 4), mlps=2)
def cosine_attention():
    return ViT(attn=CosineAttention), pictures()


class TemperatureAttention(nn.Module):
    """A learned temperature for each head, for keys of no more than the head's size."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.nh = num_heads
        self.inner = dim // 2
        self.temperature = nn.Parameter(torch.ones(num_heads))
        self.qkv = nn.Linear(dim, 3 * self.inner)
        self.back = nn.Linear(self.inner, dim)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.nh, self.inner // self.nh).permute(2, 0, 3, 1, 4)
        logits = qkv[0] @ qkv[1].mT
        weights = F.softmax(logits / self.temperature[None, :, None, None], -1)
        return self.back((weights @ qkv[2]).permute(0, 2, 1, 3).reshape(b, n, self.inner))


@own(heads=(4, 4), mlps=2)
def learned_temperature():
    return ViT(attn=TemperatureAttention), pictures()


class ReAttention(nn.Module):
    """Heads mix before and after the softmax: talking heads."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, dim * 2, bias=False)
        self.mix_heads_pre_attn = nn.Parameter(torch.randn(num_heads, num_heads))
        self.mix_heads_post_attn = nn.Parameter(torch.randn(num_heads, num_heads))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
        dots = einsum("b h i j, h g -> b g i j", dots, self.mix_heads_pre_attn)
        attn = dots.softmax(dim=-1)
        attn = einsum("b h i j, h g -> b g i j", attn, self.mix_heads_post_attn)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


@own(heads=(), mlps=2, note="every head of the output needs the maps of all heads")
def talking_heads():
    return ViT(attn=ReAttention), pictures()


class LinearAttention(nn.Module):
    """Attention without softmax: keys and values are summed first (Katharopoulos et al.)."""

    def __init__(self, dim, num_heads, eps=1e-6):
        super().__init__()
        self.n_heads = num_heads
        self.eps = eps
        self.query_projection = nn.Linear(dim, dim)
        self.key_projection = nn.Linear(dim, dim)
        self.value_projection = nn.Linear(dim, dim)
        self.out_projection = nn.Linear(dim, dim)

    def forward(self, x):
        N, L, _ = x.shape
        H = self.n_heads
        queries = F.elu(self.query_projection(x).view(N, L, H, -1)) + 1
        keys = F.elu(self.key_projection(x).view(N, L, H, -1)) + 1
        values = self.value_projection(x).view(N, L, H, -1)
        KV = torch.einsum("nshd,nshm->nhmd", keys, values)
        Z = 1 / (torch.einsum("nlhd,nhd->nlh", queries, keys.sum(dim=1)) + self.eps)
        V = torch.einsum("nlhd,nhmd,nlh->nlhm", queries, KV, Z)
        return self.out_projection(V.contiguous().view(N, L, -1))


@own(heads=(4, 4), mlps=2)
def linear_attention():
    return ViT(attn=LinearAttention), pictures()


# Attention to other sequences, pooling.


class PreNorm(nn.Module):
    def __init__(self, dim, fn, context_dim=None):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim) if context_dim is not None else None

    def forward(self, x, **kwargs):
        x = self.norm(x)
        if self.norm_context is not None:
            kwargs.update(context=self.norm_context(kwargs["context"]))
        return self.fn(x, **kwargs)


class GEGLU(nn.Module):
    def forward(self, x):
        x, gates = x.chunk(2, dim=-1)
        return x * F.gelu(gates)


class PerceiverFeedForward(nn.Module):
    def __init__(self, dim, mult=2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, dim * mult * 2), GEGLU(), nn.Linear(dim * mult, dim))

    def forward(self, x):
        return self.net(x)


class PerceiverAttention(nn.Module):
    def __init__(self, query_dim, context_dim=None, heads=4, dim_head=6):
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = query_dim if context_dim is None else context_dim
        self.scale = dim_head**-0.5
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, inner_dim * 2, bias=False)
        self.to_out = nn.Linear(inner_dim, query_dim)

    def forward(self, x, context=None):
        h = self.heads
        q = self.to_q(x)
        k, v = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        # The heads are part of the batch.
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=h) for t in (q, k, v))
        sim = einsum("b i d, b j d -> b i j", q, k) * self.scale
        out = einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "(b h) n d -> b n (h d)", h=h))


class Perceiver(nn.Module):
    def __init__(self, input_dim=10, latents=5, dim=24, classes=6):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.cross_attend_blocks = nn.ModuleList(
            [
                PreNorm(dim, PerceiverAttention(dim, input_dim), context_dim=input_dim),
                PreNorm(dim, PerceiverFeedForward(dim)),
            ]
        )
        self.layers = nn.ModuleList([PreNorm(dim, PerceiverAttention(dim)), PreNorm(dim, PerceiverFeedForward(dim))])
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, data):
        x = repeat(self.latents, "n d -> b n d", b=data.shape[0])
        cross_attn, cross_ff = self.cross_attend_blocks
        x = cross_attn(x, context=data) + x
        x = cross_ff(x) + x
        self_attn, self_ff = self.layers
        x = self_attn(x) + x
        x = self_ff(x) + x
        return self.to_logits(x.mean(dim=-2))


@own(heads=(4, 4), mlps=2)
def perceiver():
    return Perceiver(), torch.randn(2, 11, 10)


class CrossAttention(nn.Module):
    """Sequence first, and inputs by name only."""

    def __init__(self, embed_dim, memory_dim, nhead):
        super().__init__()
        self.nhead = nhead
        self.head_dim = embed_dim // nhead
        self.q_lin = nn.Linear(embed_dim, embed_dim)
        self.k_lin = nn.Linear(memory_dim, embed_dim)
        self.v_lin = nn.Linear(memory_dim, embed_dim)
        self.out_lin = nn.Linear(embed_dim, embed_dim)

    def forward(self, *, target, memory, memory_padding=None):
        T, B, _ = target.shape
        S = memory.shape[0]
        q = self.q_lin(target).view(T, B * self.nhead, self.head_dim).transpose(0, 1)
        k = self.k_lin(memory).view(S, B * self.nhead, self.head_dim).transpose(0, 1)
        v = self.v_lin(memory).view(S, B * self.nhead, self.head_dim).transpose(0, 1)
        scores = torch.baddbmm(torch.zeros(1), q, k.transpose(1, 2), beta=0, alpha=self.head_dim**-0.5)
        if memory_padding is not None:
            hidden = memory_padding.repeat_interleave(self.nhead, 0).unsqueeze(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        out = torch.bmm(scores.softmax(-1), v).transpose(0, 1).reshape(T, B, self.nhead * self.head_dim)
        return self.out_lin(out)


class Captioner(nn.Module):
    def __init__(self, vocab=45, dim=24, image_dim=16, heads=3):
        super().__init__()
        self.encoder = nn.Conv2d(3, image_dim, 4, 4)
        self.word = nn.Embedding(vocab, dim)
        self.cross = nn.ModuleList([CrossAttention(dim, image_dim, heads) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(4)])
        self.ff1 = nn.ModuleList([nn.Linear(dim, 38) for _ in range(2)])
        self.ff2 = nn.ModuleList([nn.Linear(38, dim) for _ in range(2)])
        self.out = nn.Linear(dim, vocab)

    def forward(self, image, words):
        memory = self.encoder(image).flatten(2).permute(2, 0, 1)
        x = self.word(words).transpose(0, 1)
        for i, cross in enumerate(self.cross):
            x = x + cross(target=self.norms[2 * i](x), memory=memory)
            x = x + self.ff2[i](torch.tanh(self.ff1[i](self.norms[2 * i + 1](x))))
        return self.out(x).transpose(0, 1)


@own(heads=(3, 3), mlps=2)
def decoder_cross_attention():
    return Captioner(), (pictures(12), tokens(45, 6))


class KeywordAttention(nn.Module):
    """Its block calls it with keyword arguments only, and it returns the weights too."""

    def __init__(self, hidden_size, num_attention_heads):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.attention_head_size = hidden_size // num_attention_heads
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query = nn.Linear(hidden_size, self.all_head_size)
        self.key = nn.Linear(hidden_size, self.all_head_size)
        self.value = nn.Linear(hidden_size, self.all_head_size)
        self.dense = nn.Linear(self.all_head_size, hidden_size)

    def heads(self, x):
        return x.view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, hidden_states=None, attention_mask=None, output_attentions=False):
        q, k, v = (self.heads(f(hidden_states)) for f in (self.query, self.key, self.value))
        weights = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        if attention_mask is not None:
            weights = weights + attention_mask[:, None, None, :]
        weights = weights.softmax(dim=-1)
        context = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        out = self.dense(context.view(*context.shape[:-2], self.all_head_size))
        return dict(hidden_states=out, attentions=weights if output_attentions else None)


class KeywordEncoder(nn.Module):
    def __init__(self, vocab=40, dim=24):
        super().__init__()
        self.embeddings = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(
            [
                nn.ModuleDict(
                    dict(
                        attention=KeywordAttention(dim, 4),
                        norm=nn.LayerNorm(dim),
                        up=nn.Linear(dim, 30),
                        down=nn.Linear(30, dim),
                    )
                )
                for _ in range(2)
            ]
        )
        self.classifier = nn.Linear(dim, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embeddings(input_ids)
        mask = (1.0 - attention_mask.float()) * -10000.0
        for layer in self.layers:
            x = layer["norm"](x + layer["attention"](hidden_states=x, attention_mask=mask)["hidden_states"])
            x = x + layer["down"](F.mish(layer["up"](x)))
        return self.classifier(x[:, 0])


@own(heads=(4, 4), mlps=2)
def keywords_only():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return KeywordEncoder(), dict(input_ids=tokens(40), attention_mask=mask)


class TellingAttention(nn.Module):
    """Returns the output and the weights of all heads."""

    def __init__(self, d_model=24, n_head=4, d_k=6, d_v=6):
        super().__init__()
        self.n_head, self.d_k, self.d_v = n_head, d_k, d_v
        self.w_qs = nn.Linear(d_model, n_head * d_k, bias=False)
        self.w_ks = nn.Linear(d_model, n_head * d_k, bias=False)
        self.w_vs = nn.Linear(d_model, n_head * d_v, bias=False)
        self.fc = nn.Linear(n_head * d_v, d_model, bias=False)
        self.dropout = nn.Dropout(0.1)
        self.layer_norm = nn.LayerNorm(d_model, eps=1e-6)

    def forward(self, q, k, v, mask=None):
        d_k, d_v, n_head = self.d_k, self.d_v, self.n_head
        sz_b, len_q, len_k, len_v = q.size(0), q.size(1), k.size(1), v.size(1)
        residual = q
        q = self.w_qs(q).view(sz_b, len_q, n_head, d_k).transpose(1, 2)
        k = self.w_ks(k).view(sz_b, len_k, n_head, d_k).transpose(1, 2)
        v = self.w_vs(v).view(sz_b, len_v, n_head, d_v).transpose(1, 2)
        attn = self.dropout(F.softmax(torch.matmul(q / d_k**0.5, k.transpose(2, 3)), dim=-1))
        q = torch.matmul(attn, v).transpose(1, 2).contiguous().view(sz_b, len_q, -1)
        q = self.dropout(self.fc(q))
        q += residual
        return self.layer_norm(q), attn


class PostNormFeedForward(nn.Module):
    """A two-feed-forward-layer module"""

    def __init__(self, d_in, d_hid):
        super().__init__()
        self.w_1 = nn.Linear(d_in, d_hid)
        self.w_2 = nn.Linear(d_hid, d_in)
        self.layer_norm = nn.LayerNorm(d_in, eps=1e-6)

    def forward(self, x):
        residual = x
        x = self.w_2(F.relu(self.w_1(x)))
        x += residual
        return self.layer_norm(x)


class TellingEncoder(nn.Module):
    def __init__(self, n_src_vocab=40, d_model=24, **sizes):
        super().__init__()
        self.src_word_emb = nn.Embedding(n_src_vocab, d_model, padding_idx=0)
        self.slf_attn = nn.ModuleList([TellingAttention(d_model, **sizes) for _ in range(2)])
        self.pos_ffn = nn.ModuleList([PostNormFeedForward(d_model, 48) for _ in range(2)])
        self.prj = nn.Linear(d_model, 4)

    def forward(self, src_seq, return_attns=False):
        x, attns = self.src_word_emb(src_seq), []
        for attn, ffn in zip(self.slf_attn, self.pos_ffn, strict=True):
            x, weights = attn(x, x, x)
            x = ffn(x)
            attns += [weights] if return_attns else []
        return (self.prj(x), attns) if return_attns else self.prj(x)


@own(heads=(4, 4), mlps=2)
def returns_weights():
    return TellingEncoder(), tokens(40)


@own(heads=(3, 3), mlps=2)
def unequal_k_and_v():
    return TellingEncoder(n_head=3, d_k=5, d_v=9), tokens(40)


class AttentionPool(nn.Module):
    """A learned query reads the tokens: the MAP head of SigLIP."""

    def __init__(self, dim, heads):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, dim) * 0.1)
        self.num_heads = heads
        self.head_dim = dim // heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 36), nn.GELU(approximate="tanh"), nn.Linear(36, dim))

    def forward(self, x):
        B, N, _ = x.shape
        q = self.q(self.probe.expand(B, -1, -1)).reshape(B, 1, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).reshape(B, N, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, 1, self.num_heads * self.head_dim)
        x = self.proj(x)
        return (x + self.mlp(self.norm(x)))[:, 0]


class PooledConvNet(nn.Module):
    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, dim, 3, 2, 1), nn.ReLU(), nn.Conv2d(dim, dim, 3, 2, 1))
        self.pool = AttentionPool(dim, heads)
        self.fc = nn.Linear(dim, 5)

    def forward(self, x):
        return self.fc(self.pool(self.features(x).flatten(2).transpose(1, 2)))


@own(heads=(4,), mlps=1, others=1, note="others: the channels between the two convolutions")
def attention_pool():
    return PooledConvNet(), pictures()


class QueryPool(nn.Module):
    """One learned vector for each head scores the tokens."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(heads, dim // heads))
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)

    def forward(self, x):
        k = rearrange(self.k(x), "b n (h d) -> b h n d", h=self.heads)
        v = rearrange(self.v(x), "b n (h d) -> b h n d", h=self.heads)
        w = (k * self.query[:, None]).sum(-1).softmax(-1)
        return self.o(rearrange(einsum("b h n, b h n d -> b h d", w, v), "b h d -> b (h d)"))


class PooledText(nn.Module):
    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.emb = nn.Embedding(60, dim)
        self.block = ViTBlock(dim, 4, attn=LinearAttention)
        self.pool = QueryPool(dim, heads)
        self.classify = nn.Linear(dim, 2)

    def forward(self, ids):
        return self.classify(self.pool(self.block(self.emb(ids))))


@own(heads=(4, 3), mlps=1)
def query_of_each_head():
    return PooledText(), tokens(60)


# The output projection is elsewhere.


class BertSelfAttention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.num_attention_heads = heads
        self.attention_head_size = hidden // heads
        self.all_head_size = hidden
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(0.1)

    def transpose_for_scores(self, x):
        new_x_shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(new_x_shape).permute(0, 2, 1, 3)

    def forward(self, hidden_states):
        query_layer = self.transpose_for_scores(self.query(hidden_states))
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query_layer, key_layer.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        probs = self.dropout(nn.functional.softmax(scores, dim=-1))
        context_layer = torch.matmul(probs, value_layer).permute(0, 2, 1, 3).contiguous()
        return context_layer.view(*context_layer.size()[:-2], self.all_head_size)


class BertSelfOutput(nn.Module):
    def __init__(self, inner, hidden):
        super().__init__()
        self.dense = nn.Linear(inner, hidden)
        self.LayerNorm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertAttention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.self = BertSelfAttention(hidden, heads)
        self.output = BertSelfOutput(hidden, hidden)

    def forward(self, hidden_states):
        return self.output(self.self(hidden_states), hidden_states)


class BertLayer(nn.Module):
    def __init__(self, hidden, heads, intermediate):
        super().__init__()
        self.attention = BertAttention(hidden, heads)
        self.intermediate = nn.Sequential(OrderedDict(dense=nn.Linear(hidden, intermediate), act=nn.GELU()))
        self.output = BertSelfOutput(intermediate, hidden)

    def forward(self, hidden_states):
        attention_output = self.attention(hidden_states)
        return self.output(self.intermediate(attention_output), attention_output)


class Bert(nn.Module):
    def __init__(self, vocab=50, hidden=32, heads=4, layers=2):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, hidden)
        self.position_embeddings = nn.Embedding(16, hidden)
        self.LayerNorm = nn.LayerNorm(hidden)
        self.layer = nn.ModuleList([BertLayer(hidden, heads, 52) for _ in range(layers)])
        self.pooler = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())
        self.classifier = nn.Linear(hidden, 3)

    def forward(self, input_ids):
        x = self.word_embeddings(input_ids) + self.position_embeddings.weight[: input_ids.shape[1]]
        x = self.LayerNorm(x)
        for layer_module in self.layer:
            x = layer_module(x)
        return self.classifier(self.pooler(x[:, 0]))


@own(heads=(4, 4), mlps=2, others=1, note="others: the pooler, a layer with tanh before the classifier")
def bert_self_and_output():
    return Bert(), tokens()


class CoreAttention(nn.Module):
    """Only queries, keys and values; the block projects."""

    def __init__(self, dim, h):
        super().__init__()
        self.h = h
        self.in_proj = nn.Linear(dim, 3 * dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.in_proj(x).view(b, n, 3, self.h, -1).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ProjectingBlock(nn.Module):
    def __init__(self, dim, h):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.core = CoreAttention(dim, h)
        self.out_proj = nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        x = x + self.out_proj(self.core(self.ln1(x)))
        return x + self.fc2(F.silu(self.fc1(self.ln2(x))))


class SignalNet(nn.Module):
    """Signals in: frames of numbers."""

    def __init__(self, block, features=5, dim=24, outputs=4):
        super().__init__()
        self.inp = nn.Linear(features, dim)
        self.blocks = nn.ModuleList([block(dim) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, outputs)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def signals(length: int = 7, features: int = 5) -> Tensor:
    return torch.randn(2, length, features)


@own(heads=(3, 3), mlps=2)
def projection_in_the_block():
    return SignalNet(partial(ProjectingBlock, h=3)), signals()


class FlatBlock(nn.Module):
    """Attention and MLP are lines of one forward, without modules around them."""

    def __init__(self, dim, n_heads=4):
        super().__init__()
        self.n_heads = n_heads
        self.norm_a = nn.LayerNorm(dim)
        self.norm_m = nn.LayerNorm(dim)
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 40), nn.Linear(40, dim)

    def forward(self, x):
        bs, sl, dm = x.shape
        y = self.norm_a(x)
        q = self.q(y).reshape(bs, sl, self.n_heads, dm // self.n_heads).swapaxes(1, 2)
        k = self.k(y).reshape(bs, sl, self.n_heads, dm // self.n_heads).swapaxes(1, 2)
        v = self.v(y).reshape(bs, sl, self.n_heads, dm // self.n_heads).swapaxes(1, 2)
        w = torch.softmax(q @ k.swapaxes(2, 3) / (dm // self.n_heads) ** 0.5, -1)
        x = x + self.o((w @ v).swapaxes(1, 2).reshape(bs, sl, dm))
        return x + self.down(F.leaky_relu(self.up(self.norm_m(x)), 0.1))


@own(heads=(4, 4), mlps=2)
def attention_in_the_block():
    return SignalNet(FlatBlock), signals()


class ManyHeads(nn.Module):
    """Layers without transposes: tokens, heads, features, in the order in which xformers wants them."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def memory_efficient_attention(self, q, k, v):
        scores = torch.einsum("bmhk,bnhk->bhmn", q * q.shape[-1] ** -0.5, k)
        return torch.einsum("bhmn,bnhk->bmhk", scores.softmax(-1), v)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = torch.unbind(self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads), 2)
        return self.proj(self.memory_efficient_attention(q, k, v).reshape([B, N, C]))


@own(heads=(4, 4), mlps=2)
def xformers_layout():
    return ViT(attn=ManyHeads), pictures()


# A cache of keys and values.


class CachedAttention(nn.Module):
    """Appends its keys and values to a dict that the caller owns."""

    def __init__(self, dim, n_head, layer_id):
        super().__init__()
        self.layer_id = layer_id
        self.n_head = n_head
        self.head_size = dim // n_head
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x, cache=None):
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, self.n_head, self.head_size).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        if cache is not None:
            if self.layer_id in cache:
                past_k, past_v = cache[self.layer_id]
                k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
            cache[self.layer_id] = (k, v)
        S = k.size(2)
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_size))


class CachedDecoder(nn.Module):
    def __init__(self, vocab=40, dim=24, n_head=4):
        super().__init__()
        self.emb = nn.Embedding(vocab, dim)
        self.attns = nn.ModuleList([CachedAttention(dim, n_head, i) for i in range(2)])
        self.mlps = nn.ModuleList([nn.Sequential(nn.Linear(dim, 44), nn.ReLU(), nn.Linear(44, dim)) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(5)])
        self.unemb = nn.Linear(dim, vocab)

    def forward(self, ids, cache=None):
        cache = {} if cache is None else cache
        x = self.emb(ids)
        for i in range(2):
            x = x + self.attns[i](self.norms[2 * i](x), cache=cache)
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.unemb(self.norms[4](x))


@own(heads=(4, 4), mlps=2)
def dict_cache():
    return CachedDecoder(), tokens(40)


class ListCacheAttention(nn.Module):
    """Appends its keys and values to a list."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.Linear(dim, 3 * dim)
        self.merge = nn.Linear(dim, dim)

    def forward(self, x, presents):
        q, k, v = rearrange(self.attn(x), "b t (s h d) -> s b h t d", s=3, h=self.heads)
        presents.append((k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.merge(rearrange(y, "b h t d -> b t (h d)"))


class ListCacheDecoder(nn.Module):
    """Returns the logits, and the keys and values as a list."""

    def __init__(self, vocab=40, dim=32, heads=4):
        super().__init__()
        self.emb = nn.Embedding(vocab, dim)
        self.attns = nn.ModuleList([ListCacheAttention(dim, heads) for _ in range(2)])
        self.ffs = nn.ModuleList([FeedForward(dim, 40) for _ in range(2)])
        self.out = nn.Linear(dim, vocab)

    def forward(self, ids, use_cache=False):
        x, presents = self.emb(ids), []
        for attn, ff in zip(self.attns, self.ffs, strict=True):
            x = x + attn(F.layer_norm(x, x.shape[-1:]), presents)
            x = x + ff(x)
        return (self.out(x), presents) if use_cache else self.out(x)


@own(heads=(4, 4), mlps=2)
def list_cache():
    return ListCacheDecoder(), tokens(40)


# Attentions of torch.


class TorchBlock(nn.Module):
    def __init__(self, dim, heads=4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        y = self.norm1(x)
        attended, _ = self.attention(y, y, y, need_weights=False)
        x = x + attended
        return x + self.feed_forward(self.norm2(x))


@own(heads=(4, 4), mlps=2)
def torch_attention_in_a_block():
    return SignalNet(TorchBlock), signals()


class EncoderModel(nn.Module):
    def __init__(self, vocab=40, d_model=24, nhead=3):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        layer = nn.TransformerEncoderLayer(d_model, nhead, 40, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(d_model, 5)

    def forward(self, src):
        return self.fc(self.encoder(self.embedding(src)).mean(1))


@own(heads=(3, 3), mlps=2)
def torch_encoder():
    return EncoderModel(), tokens(40)


@own(heads=(3,), mlps=1, note="the layer is the model: there is no module around it")
def torch_encoder_layer_alone():
    return nn.TransformerEncoderLayer(24, 3, 40, batch_first=True), torch.randn(2, 7, 24)


class DecoderModel(nn.Module):
    def __init__(self, vocab=40, d_model=24, nhead=4):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.layers = nn.ModuleList(
            [nn.TransformerDecoderLayer(d_model, nhead, 36, batch_first=True, norm_first=True) for _ in range(2)]
        )
        self.fc = nn.Linear(d_model, vocab)

    def forward(self, tgt, memory):
        x = self.embedding(tgt)
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(1))
        for layer in self.layers:
            x = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
        return self.fc(x)


@own(heads=(4,) * 4, mlps=2)
def torch_decoder_layers():
    return DecoderModel(), (tokens(40, 6), torch.randn(2, 8, 24))


class FunctionalAttention(nn.Module):
    """Calls torch's function with layers of its own, as CLIP's pooling does."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, embed_dim)
        self.num_heads = num_heads

    def forward(self, x):
        x = x.transpose(0, 1)
        x, _ = F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.num_heads,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return x.transpose(0, 1)


@own(heads=(4, 4), mlps=2, note="torch's function checks that all heads together are as wide as the input")
def torch_function():
    return ViT(attn=FunctionalAttention), pictures()


# MLPs.


class GEGLUFirst(nn.Module):
    """Projection and gate in one module. The gate comes first."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, hidden_states):
        gate, hidden_states = self.proj(hidden_states).chunk(2, dim=-1)
        return F.gelu(gate) * hidden_states


class GEGLULast(nn.Module):
    """Like diffusers: projection and gate in one module. The gate comes last."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, hidden_states):
        hidden_states, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return hidden_states * F.gelu(gate)


class DiffusersFeedForward(nn.Module):
    def __init__(self, dim, activation=GEGLULast, mult=2):
        super().__init__()
        self.net = nn.ModuleList([activation(dim, dim * mult), nn.Dropout(0.0), nn.Linear(dim * mult, dim)])

    def forward(self, hidden_states):
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states


class MLPBlock(nn.Module):
    """Pools over tokens, so that tokens see each other, then an MLP of the caller's choice."""

    def __init__(self, dim, mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim)

    def forward(self, x):
        x = x + self.norm1(x).mean(dim=1, keepdim=True)
        return x + self.mlp(self.norm2(x))


def with_mlp(mlp: Callable[[int], nn.Module]) -> tuple[nn.Module, Tensor]:
    return SignalNet(partial(MLPBlock, mlp=mlp)), signals()


@own(mlps=2)
def geglu_gate_last():
    return with_mlp(DiffusersFeedForward)


@own(mlps=2)
def geglu_gate_first():
    return with_mlp(partial(DiffusersFeedForward, activation=GEGLUFirst))


class SwiGLUFFN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        hidden = int(8 * dim / 3)
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@own(mlps=2)
def swiglu_separate():
    return with_mlp(SwiGLUFFN)


class GLUFFN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc_in = nn.Linear(dim, 2 * 30)
        self.fc_out = nn.Linear(30, dim)

    def forward(self, x):
        return self.fc_out(F.glu(self.fc_in(x), dim=-1))


@own(mlps=2)
def glu_function():
    return with_mlp(GLUFFN)


class NnGLU(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 2 * 34), nn.GLU(dim=-1), nn.Dropout(0.1), nn.Linear(34, dim))


@own(mlps=2)
def glu_module():
    return with_mlp(NnGLU)


class PackedSwiGLU(nn.Module):
    """w12 as in DINOv2."""

    def __init__(self, dim, hidden=28):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        x12 = self.w12(x)
        x1, x2 = x12.chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


@own(mlps=2)
def swiglu_packed():
    return with_mlp(PackedSwiGLU)


class ConvMlp1d(nn.Module):
    """Convolutions of size 1, channels before tokens."""

    def __init__(self, dim, inner=40):
        super().__init__()
        self.conv1 = nn.Conv1d(dim, inner, kernel_size=1)
        self.conv2 = nn.Conv1d(inner, dim, kernel_size=1)
        self.activation = nn.ReLU()

    def forward(self, x):
        y = self.activation(self.conv1(x.transpose(-1, 1)))
        return self.conv2(y).transpose(-1, 1)


@own(mlps=2)
def conv1d_mlp():
    return with_mlp(ConvMlp1d)


class MixFFN(nn.Module):
    """A depthwise convolution over tokens between the layers."""

    def __init__(self, dim, hidden=36):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.fc1(x)
        x = F.gelu(self.dwconv(x.transpose(1, 2)).transpose(1, 2))
        return self.fc2(x)


@own(mlps=2)
def depthwise_mlp():
    return with_mlp(MixFFN)


class SubLNFFN(nn.Module):
    """A norm over the hidden features."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.ffn_layernorm = nn.LayerNorm(2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x).float()).type_as(x)))


@own(mlps=2)
def subln_mlp():
    return with_mlp(SubLNFFN)


class SquaredReLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.key = nn.Linear(dim, 3 * dim, bias=False)
        self.value = nn.Linear(3 * dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        k = torch.square(torch.relu(self.key(x)))
        return torch.sigmoid(self.receptance(x)) * self.value(k)


@own(mlps=2)
def squared_relu():
    return with_mlp(SquaredReLU)


class ScaledReLU(nn.Module):
    """Scales and shifts each hidden feature, as in StarReLU or layer scale."""

    def __init__(self, dim, hidden=33):
        super().__init__()
        self.inner = nn.Linear(dim, hidden)
        self.gain = nn.Parameter(torch.ones(hidden))
        self.shift = nn.Parameter(torch.zeros(hidden))
        self.outer = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.outer(F.relu(self.inner(x)) ** 2 * self.gain + self.shift)


@own(mlps=2)
def scaled_hidden_features():
    return with_mlp(ScaledReLU)


@own(mlps=2)
def mlp_on_the_root():
    layers = [nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3)]
    return nn.Sequential(*layers), torch.randn(2, 12)


class ActorCritic(nn.Module):
    """Two layers read the hidden features."""

    def __init__(self, observations=9, hidden=32, actions=4):
        super().__init__()
        self.fc1 = nn.Linear(observations, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc_pi = nn.Linear(hidden, actions)
        self.fc_v = nn.Linear(hidden, 1)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = torch.tanh(self.fc2(x))
        return F.softmax(self.fc_pi(x), dim=-1), self.fc_v(x)


@own(mlps=2)
def actor_critic():
    return ActorCritic(), torch.randn(2, 9)


# Mixtures of experts.


class Expert(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.w1 = nn.Linear(d_model, d_ff)
        self.w2 = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.w2(F.gelu(self.w1(x)))


class SparseMoE(nn.Module):
    """Each token visits two experts. An expert sees only its tokens."""

    def __init__(self, d_model, num_experts=3, top_k=2):
        super().__init__()
        self.experts = nn.ModuleList([Expert(d_model, 28) for _ in range(num_experts)])
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        self.top_k = top_k

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(self.gate(flat), self.top_k)
        weights = F.softmax(weights, dim=1)
        results = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, nth = torch.where(chosen == i)
            results[rows] += weights[rows, nth, None] * expert(flat[rows])
        return results.view_as(x)


@own(mlps=6)
def moe_module_list():
    return SignalNet(partial(MLPBlock, mlp=SparseMoE)), signals(length=12)


class SoftRoutedExperts(nn.Module):
    """All experts see all tokens. Their weights are stacked."""

    def __init__(self, dim, num_experts=3, hidden_dim=30):
        super().__init__()
        self.router = nn.Linear(dim, num_experts)
        self.w1 = nn.Parameter(torch.randn(num_experts, dim, hidden_dim) * 0.2)
        self.b1 = nn.Parameter(torch.zeros(num_experts, 1, hidden_dim))
        self.w2 = nn.Parameter(torch.randn(num_experts, hidden_dim, dim) * 0.2)

    def forward(self, x):
        b, n, d = x.shape
        xs = x.reshape(1, b * n, d).expand(self.w1.shape[0], -1, -1)
        hidden = F.silu(torch.bmm(xs, self.w1) + self.b1)
        out = torch.bmm(hidden, self.w2)
        weights = self.router(x).reshape(b * n, -1).softmax(-1)
        return (out * weights.t().unsqueeze(-1)).sum(0).view(b, n, d)


@own(mlps=2, note="the experts' tensors keep one size: a unit is one neuron of each expert")
def moe_bmm():
    return with_mlp(SoftRoutedExperts)


class OneHotExperts(nn.Module):
    """Dispatches tokens with one-hot vectors and einsum, as in Switch."""

    def __init__(self, dim, num_experts=4, hidden_dim=26):
        super().__init__()
        self.num_experts = num_experts
        self.w_gating = nn.Parameter(torch.randn(dim, num_experts))
        self.w_in = nn.Parameter(torch.randn(num_experts, dim, 2 * hidden_dim) * 0.2)
        self.w_out = nn.Parameter(torch.randn(num_experts, hidden_dim, dim) * 0.2)

    def forward(self, inputs):
        gates = einsum("b n d, d e -> b n e", inputs, self.w_gating).softmax(dim=-1)
        gate, index = gates.max(dim=-1)
        dispatch = F.one_hot(index, self.num_experts).to(inputs.dtype)
        expert_inputs = einsum("b n d, b n e -> e b n d", inputs, dispatch)
        hidden, gating = einsum("e b n d, e d h -> e b n h", expert_inputs, self.w_in).chunk(2, dim=-1)
        expert_outputs = einsum("e b n h, e h d -> e b n d", hidden * F.gelu(gating), self.w_out)
        return einsum("e b n d, b n e -> b n d", expert_outputs, dispatch * gate.unsqueeze(-1))


@own(mlps=2, note="as moe_bmm, with gates")
def moe_one_hot():
    return with_mlp(OneHotExperts)


class SharedExpertMoE(nn.Module):
    """DeepSeek's: every token visits the shared expert too."""

    def __init__(self, dim, experts=3):
        super().__init__()
        self.shared_expert = SwiGLUFFN(dim)
        self.experts = nn.ModuleDict({f"expert_{i}": SwiGLUFFN(dim) for i in range(experts)})
        self.gate = nn.Linear(dim, experts, bias=False)

    def forward(self, x):
        scores = self.gate(x).sigmoid()
        outs = torch.stack([expert(x) for expert in self.experts.values()], dim=-1)
        keep = torch.zeros_like(scores).scatter_(-1, scores.topk(2, dim=-1).indices, 1.0)
        return self.shared_expert(x) + (outs * (scores * keep).unsqueeze(-2)).sum(-1)


@own(mlps=8)
def moe_shared_expert():
    return with_mlp(SharedExpertMoE)


# Layers that are used more than once.


class UniversalNet(nn.Module):
    """Both blocks have the same MLP module."""

    def __init__(self, dim=24):
        super().__init__()
        self.inp = nn.Linear(5, dim)
        shared = nn.Sequential(nn.Linear(dim, 42), nn.GELU(), nn.Linear(42, dim))
        self.layers = nn.ModuleList(
            [nn.ModuleDict(dict(attn=LinearAttention(dim, 4), norm=nn.LayerNorm(dim), mlp=shared)) for _ in range(2)]
        )
        self.out = nn.Linear(dim, 4)

    def forward(self, x):
        x = self.inp(x)
        for layer in self.layers:
            x = x + layer["attn"](layer["norm"](x))
            x = x + layer["mlp"](x)
        return self.out(x)


@own(heads=(4, 4), mlps=1)
def tied_mlp_module():
    return UniversalNet(), signals()


class TiedWeightsNet(nn.Module):
    """Two MLPs with the same tensors."""

    def __init__(self, dim=24):
        super().__init__()
        self.inp = nn.Linear(5, dim)
        self.first, self.second = ViTMlp(dim, 37), ViTMlp(dim, 37)
        for layer in ("fc1", "fc2"):
            getattr(self.second, layer).weight = getattr(self.first, layer).weight
            getattr(self.second, layer).bias = getattr(self.first, layer).bias
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 4)

    def forward(self, x):
        x = self.inp(x)
        x = x + self.first(self.norm1(x))
        x = x + self.second(self.norm2(x))
        return self.out(x)


@own(mlps=1, note="the two MLPs are one site")
def tied_mlp_weights():
    return TiedWeightsNet(), signals()


class Albert(nn.Module):
    """All layers are one module. The embedding is small and projected."""

    def __init__(self, vocab=50, embedding=12, hidden=32, heads=4, layers=3):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, embedding)
        self.embedding_hidden_mapping_in = nn.Linear(embedding, hidden)
        self.shared_layer = BertLayer(hidden, heads, 48)
        self.num_hidden_layers = layers
        self.classifier = nn.Linear(hidden, 3)

    def forward(self, input_ids):
        x = self.embedding_hidden_mapping_in(self.word_embeddings(input_ids))
        for _ in range(self.num_hidden_layers):
            x = self.shared_layer(x)
        return self.classifier(x.mean(1))


@own(heads=(4,), mlps=1, others=1, note="others: the features of the small embedding")
def albert_shared_layer():
    return Albert(), tokens()


# Heads of detection, convolutional blocks, MLPs over tokens.


class DetMLP(nn.Module):
    """Very simple multi-layer perceptron (also called FFN)"""

    def __init__(self, input_dim, hidden_dim, output_dim, num_layers):
        super().__init__()
        self.num_layers = num_layers
        h = [hidden_dim] * (num_layers - 1)
        self.layers = nn.ModuleList(nn.Linear(n, k) for n, k in zip([input_dim, *h], [*h, output_dim], strict=True))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if i < self.num_layers - 1 else layer(x)
        return x


class TinyDETR(nn.Module):
    def __init__(self, hidden_dim=32, nheads=4, num_queries=6, num_classes=5):
        super().__init__()
        self.backbone = nn.Conv2d(3, hidden_dim, 4, 4)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.transformer = nn.Transformer(hidden_dim, nheads, 1, 1, 40, batch_first=True)
        self.class_embed = nn.Sequential(nn.Linear(hidden_dim, 24), nn.ReLU(), nn.Linear(24, num_classes + 1))
        self.bbox_embed = DetMLP(hidden_dim, 20, 4, 3)

    def forward(self, images):
        src = self.backbone(images).flatten(2).transpose(1, 2)
        query = self.query_embed.weight.unsqueeze(0).expand(images.shape[0], -1, -1)
        hs = self.transformer(src, query)
        return {"pred_logits": self.class_embed(hs), "pred_boxes": self.bbox_embed(hs).sigmoid()}


@own(heads=(4, 4, 4), mlps=5, note="the box head has two hidden layers")
def detr_heads():
    return TinyDETR(), pictures()


class ConvNextBlock(nn.Module):
    def __init__(self, dim, layer_scale_init_value=1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 3 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(3 * dim, dim)
        self.gamma = nn.Parameter(layer_scale_init_value * torch.ones(dim))

    def forward(self, x):
        input = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = (self.gamma * x).permute(0, 3, 1, 2)
        return input + x


class ConvNextNet(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.stage = nn.Sequential(ConvNextBlock(dim), ConvNextBlock(dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 6)

    def forward(self, x):
        return self.head(self.norm(self.stage(self.stem(x)).mean([-2, -1])))


@own(mlps=2)
def convnext_blocks():
    return ConvNextNet(), pictures()


class SqueezeExcite(nn.Module):
    def __init__(self, dim, reduced=7):
        super().__init__()
        self.conv_reduce = nn.Conv2d(dim, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, dim, 1)

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        return x * self.conv_expand(F.relu(self.conv_reduce(s))).sigmoid()


class SEBlock(nn.Module):
    """An inverted bottleneck with squeeze and excitation inside."""

    def __init__(self, dim, mid=30):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(dim, mid, 1), nn.BatchNorm2d(mid), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(mid, mid, 3, padding=1, groups=mid), nn.BatchNorm2d(mid))
        self.se = SqueezeExcite(mid)
        self.project = nn.Conv2d(mid, dim, 1)

    def forward(self, x):
        return x + self.project(self.se(self.depthwise(self.expand(x))))


class MobileNet(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, 2, 1)
        self.blocks = nn.Sequential(SEBlock(dim), SEBlock(dim))
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


@own(mlps=4, note="two bottlenecks, two squeezes")
def squeeze_and_excite():
    return MobileNet(), pictures(10)


class MlpBlock(nn.Module):
    def __init__(self, dim, mlp_dim):
        super().__init__()
        self.Dense_0 = nn.Linear(dim, mlp_dim)
        self.Dense_1 = nn.Linear(mlp_dim, dim)

    def forward(self, y):
        return self.Dense_1(nn.functional.gelu(self.Dense_0(y)))


class MixerBlock(nn.Module):
    def __init__(self, tokens, dim, tokens_mlp_dim, channels_mlp_dim):
        super().__init__()
        self.LayerNorm_0, self.LayerNorm_1 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_mixing = MlpBlock(tokens, tokens_mlp_dim)
        self.channel_mixing = MlpBlock(dim, channels_mlp_dim)

    def forward(self, x):
        y = self.LayerNorm_0(x)
        y = torch.transpose(y, 1, 2)
        y = self.token_mixing(y)
        y = torch.transpose(y, 1, 2)
        x = x + y
        return x + self.channel_mixing(self.LayerNorm_1(x))


class Mixer(nn.Module):
    def __init__(self, dim=24, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.ModuleList([MixerBlock(16, dim, 20, 44) for _ in range(2)])
        self.pre_head_layer_norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, inputs):
        x = rearrange(self.stem(inputs), "n c h w -> n (h w) c")
        for block in self.blocks:
            x = block(x)
        return self.head(self.pre_head_layer_norm(x).mean(dim=1))


@own(mlps=4)
def mlp_mixer():
    return Mixer(), pictures()


class SpatialGatingUnit(nn.Module):
    def __init__(self, d_ffn, seq_len):
        super().__init__()
        self.norm = nn.LayerNorm(d_ffn)
        self.spatial_proj = nn.Conv1d(seq_len, seq_len, kernel_size=1)
        nn.init.constant_(self.spatial_proj.bias, 1.0)

    def forward(self, x):
        u, v = x.chunk(2, dim=-1)
        v = self.norm(v)
        v = self.spatial_proj(v)
        return u * v


class gMLPBlock(nn.Module):
    def __init__(self, d_model, d_ffn, seq_len):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.channel_proj1 = nn.Linear(d_model, d_ffn * 2)
        self.channel_proj2 = nn.Linear(d_ffn, d_model)
        self.sgu = SpatialGatingUnit(d_ffn, seq_len)

    def forward(self, x):
        residual = x
        x = F.gelu(self.channel_proj1(self.norm(x)))
        x = self.sgu(x)
        return self.channel_proj2(x) + residual


@own(mlps=2, note="the norm's mean is over the hidden features: a gate has to count the kept ones only")
def gmlp():
    return SignalNet(partial(gMLPBlock, d_ffn=30, seq_len=7)), signals()


class AdaLNBlock(nn.Module):
    """A block of DiT: a condition scales and shifts the norms' outputs."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = ViTAttn(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = ViTMlp(hidden_size, 2 * hidden_size, act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class DiT(nn.Module):
    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.x_embedder = nn.Conv2d(3, dim, 4, 4)
        self.t_embedder = nn.Sequential(nn.Linear(16, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder = nn.Embedding(5, dim)
        self.blocks = nn.ModuleList([AdaLNBlock(dim, heads) for _ in range(2)])
        self.final = nn.Linear(dim, 48)

    def forward(self, x, t, y):
        h = w = x.shape[-1] // 4
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(timestep_embedding(t, 16)) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return rearrange(self.final(x), "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=4, q=4)


@own(heads=(3, 3), mlps=3, note="the embedding of time is an MLP")
def diffusion_transformer():
    return DiT(), (pictures(8), torch.tensor([5, 700]), torch.tensor([1, 4]))


# The command.


def plans_of(sites: xprune.Sites) -> list[xprune.Plan]:
    """Returns the plans that each model is pruned with: two random ones, and one that keeps one unit of each site."""
    one = xprune.Plan(tuple(sites), tuple((site.size // 2,) for site in sites))
    return [random_plan(sites, 0), random_plan(sites, 1), one]


def examine(name: str) -> dict[str, Any]:
    """Finds the sites of one model and prunes it with each plan.

    Returns:
        A dict. "heads" and "neurons" hold the sizes of the sites found, "names" their names. "left" holds the modules
        left alone with the reasons. "plans" has one text for each plan: "exact", or the error. If `find_sites` raised
        an error, "error" holds it. "seconds" is the time of `find_sites`.
    """
    model, inputs = build(name)
    began = time.perf_counter()
    found = dict(NOTHING)
    try:
        sites = xprune.find_sites(model, inputs)
    except Exception as error:
        return {**found, "error": _text(error), "seconds": time.perf_counter() - began}
    found["seconds"] = time.perf_counter() - began
    found["heads"] = [site.size for site in sites if site.kind == "head"]
    found["neurons"] = [site.size for site in sites if site.kind == "neuron"]
    found["names"] = [site.name for site in sites]
    found["left"] = dict(sites.left)
    found["plans"] = [_pruned(model, plan, inputs) for plan in plans_of(sites)]
    return found


NOTHING: dict[str, Any] = {"heads": [], "neurons": [], "names": [], "left": {}, "plans": [], "seconds": 0.0}


def _pruned(model: nn.Module, plan: xprune.Plan, inputs: Any) -> str:
    """Prunes a model. Returns "exact", or the error."""
    try:
        # It raises SurgeryError if the pruned model does not equal the gated dense one.
        xprune.apply(model, plan, inputs)
    except Exception as error:
        return _text(error)
    return "exact"


def _text(error: Exception) -> str:
    """Returns an error as text. An error that is none of xprune's own is a fault of xprune."""
    return ("" if isinstance(error, xprune.XPruneError) else "FAULT ") + f"{type(error).__name__}: {error}"


def as_expected(name: str, heads: list[int], neurons: list[int]) -> bool:
    """Returns True if the sizes of the sites found are what a perfect tool would find, else False."""
    entry = ZOO[name]
    return sorted(heads) == sorted(entry.heads) and entry.mlps <= len(neurons) <= entry.mlps + entry.others


def _into(queue: Any, name: str) -> None:
    """Examines one model in a child process and puts the result into the queue."""
    torch.set_num_threads(1)
    queue.put(examine(name))


def in_child(name: str, seconds: int) -> dict[str, Any]:
    """Examines one model in a forked child, so that a crash or a loop without end costs this model only."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_into, args=(queue, name), daemon=True)
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        return {**NOTHING, "error": f"FAULT over {seconds} s"}
    if queue.empty():
        return {**NOTHING, "error": f"FAULT the process ended with exit code {child.exitcode}"}
    return queue.get()


def silent(name: str, found: dict[str, Any]) -> int:
    """Returns how many attentions and MLPs are neither found nor left alone with a reason, at least."""
    entry = ZOO[name]
    missing = max(0, len(entry.heads) - len(found["heads"])) + max(0, entry.mlps - len(found["neurons"]))
    # The message for a model without any site begins with its first reasons. This text stands there if it has none.
    if found.get("error") and "it has no attention with" not in found["error"]:
        return 0
    return max(0, missing - len(found["left"]))


def line(name: str, found: dict[str, Any]) -> str:
    """Returns the text about one model: its name, the sites found of those expected, and the plans."""
    entry = ZOO[name]
    exact, allowed = found["plans"].count("exact"), f" to {entry.mlps + entry.others}" if entry.others else ""
    parts = [
        "ok  " if as_expected(name, found["heads"], found["neurons"]) else "MISS",
        f"{name:26}",
        f"attentions {len(found['heads'])} of {len(entry.heads)}",
        f"MLPs {len(found['neurons'])} of {entry.mlps}{allowed}",
        f"exact {exact} of {len(found['plans'])}",
        f"{found['seconds']:.1f} s",
    ]
    if len(found["heads"]) == len(entry.heads) and sorted(found["heads"]) != sorted(entry.heads):
        parts.append(f"their heads are {found['heads']}, not {list(entry.heads)}")
    if silent(name, found):
        parts.append(f"{silent(name, found)} without a reason")
    problems = [plan for plan in found["plans"] if plan != "exact"]
    return "  ".join(parts) + "".join(f"\n      {problem[:300]}" for problem in problems)


def main(
    only: Annotated[str, typer.Option(help="Only models whose name contains this text.")] = "",
    seconds: Annotated[int, typer.Option(help="Time limit for each model.")] = 60,
    list_sites: Annotated[bool, typer.Option("--sites", help="Also print the names of the sites found.")] = False,
) -> None:
    """Prints what `find_sites` finds in each model of the zoo, and whether its sites are pruned exactly."""
    names = [name for name in ZOO if only in name]
    if not names:
        raise SystemExit(f"The name of no model contains {only!r}. The models are {', '.join(ZOO)}.")
    torch.set_num_threads(1)
    # Imports what xprune imports late, before there are children. Otherwise each child would import it.
    xprune.find_sites(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), torch.randn(2, 3, 8))
    results = {}
    for name in names:
        results[name] = found = in_child(name, seconds)
        print(line(name, found), flush=True)
        if list_sites:
            print("     ", ", ".join(found["names"]) or "no sites")
    entries = {name: ZOO[name] for name in names}
    right = [name for name in names if as_expected(name, results[name]["heads"], results[name]["neurons"])]
    heads = sum(min(len(results[name]["heads"]), len(entry.heads)) for name, entry in entries.items())
    mlps = sum(min(len(results[name]["neurons"]), entry.mlps) for name, entry in entries.items())
    plans = [plan for found in results.values() for plan in found["plans"]]
    faults = [text for found in results.values() for text in (*found["plans"], found.get("error", ""))]
    print(f"\n{len(right)} of {len(names)} models as expected")
    print(f"{heads} of {sum(len(entry.heads) for entry in entries.values())} attentions found")
    print(f"{mlps} of {sum(entry.mlps for entry in entries.values())} MLPs found")
    print(f"{sum(silent(name, found) for name, found in results.items())} neither found nor left alone with a reason")
    print(f"{plans.count('exact')} of {len(plans)} plans exact")
    print(f"{sum(text.startswith('FAULT') for text in faults)} faults")
    print("\nLeft alone, with the reasons:")
    for name in names:
        if results[name].get("error"):
            print(f"  {name}: {results[name]['error']}")
        for path, why in results[name]["left"].items():
            print(f"  {name} {path or 'the model'}: {why}")


if __name__ == "__main__":
    typer.run(main)
