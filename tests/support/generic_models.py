"""Attentions and MLPs as users write them: some that xprune finds by their structure, and some that it leaves alone."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.testing import perturb

DIM, TOKENS = 16, 5


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Maps q, k, v (batch, heads, tokens, head size) to (batch, tokens, heads * head size)."""
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class Base(nn.Module):
    """An attention. The number of heads times the head size need not be the hidden size."""

    def __init__(self, heads=4, width=6, kv=None):
        super().__init__()
        self.heads, self.inner = heads, heads * width
        self.build(heads, width, kv or heads)

    def split(self, x, heads=None):
        return x.unflatten(-1, (heads or self.heads, -1)).transpose(1, 2)


class Fused(Base):
    """As in vit-pytorch: a norm inside, one layer for q, k and v, and the output projection in a Sequential."""

    def build(self, heads, width, _):
        self.norm, self.to_qkv = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * heads * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * width, DIM), nn.Dropout(0.1))

    def forward(self, x):
        return self.to_out(attend(*(self.split(t) for t in self.to_qkv(self.norm(x)).chunk(3, -1))))


class HeadFirst(Base):
    """The rows of the `qkv` weight are ordered by head: (heads, 3, head size)."""

    def build(self, heads, width, _):
        self.qkv, self.proj = nn.Linear(DIM, 3 * heads * width), nn.Linear(heads * width, DIM)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.proj(attend(q, k, v))


class Pair(Base):
    """One layer for q, and one for k and v."""

    def build(self, heads, width, _):
        self.q, self.kv = nn.Linear(DIM, heads * width), nn.Linear(DIM, 2 * heads * width)
        self.proj = nn.Linear(heads * width, DIM)

    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        return self.proj(attend(self.split(self.q(x)), self.split(k), self.split(v)))


class Apart(Base):
    """As in x-transformers: separate layers, and heads that together are not the hidden size.

    An attribute holds the size of all heads together.
    """

    def build(self, heads, width, kv):
        self.kv_heads, self.inner_dim = kv, heads * width
        self.to_q, self.to_out = nn.Linear(DIM, heads * width), nn.Linear(heads * width, DIM, bias=False)
        self.to_k, self.to_v = nn.Linear(DIM, kv * width), nn.Linear(DIM, kv * width)

    def forward(self, x):
        rows, tokens, _ = x.shape
        q = self.split(self.to_q(x))
        k, v = (self.split(layer(x), self.kv_heads) for layer in (self.to_k, self.to_v))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        return self.to_out(attend(q, k, v).reshape(rows, tokens, self.inner_dim))


class Shared(Base):
    """One key and one value for all heads."""

    def build(self, heads, width, _):
        self.q, self.kv = nn.Linear(DIM, heads * width), nn.Linear(DIM, 2 * width)
        self.proj = nn.Linear(heads * width, DIM)

    def forward(self, x):
        k, v = (t[:, None].expand(-1, self.heads, -1, -1) for t in self.kv(x).chunk(2, -1))
        return self.proj(attend(self.split(self.q(x)), k, v))


class Biased(Base):
    """A position bias and a temperature for each head, and a factor made from the number of dense features."""

    def build(self, heads, width, _):
        self.qkv, self.proj = nn.Linear(DIM, 3 * heads * width), nn.Linear(heads * width, DIM)
        self.bias = nn.Parameter(torch.zeros(TOKENS, TOKENS, heads))
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q_norm = nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = (self.split(t) for t in (self.qkv(x) * self.inner**-0.5).chunk(3, -1))
        return self.proj(attend(self.q_norm(q) * self.temperature, k, v, self.bias.permute(2, 0, 1)))


class Telling(Fused):
    """Returns its attention weights too, as many Hugging Face attentions do."""

    def forward(self, x):
        q, k, v = (self.split(t) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2)), weights


class Residual(Fused):
    """Adds its input itself, so it returns more than a bias when all its heads are removed."""

    def forward(self, x):
        return x + super().forward(x)


class Packed(nn.Module):
    """An MLP with values and gates in one layer, and a norm over the hidden neurons."""

    def __init__(self, hidden=10, norm=True, interleaved=False):
        super().__init__()
        self.w12, self.w3 = nn.Linear(DIM, 2 * hidden), nn.Linear(hidden, DIM)
        self.norm, self.interleaved = nn.LayerNorm(hidden) if norm else nn.Identity(), interleaved

    def forward(self, x):
        x = self.w12(x)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else x.chunk(2, -1)
        return self.w3(self.norm(F.silu(a) * b))


class Model(nn.Module):
    """Two blocks of an attention and an MLP."""

    def __init__(self, attention=Fused, mlp=Packed, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(7, DIM), nn.Linear(DIM, 3)
        self.attentions = nn.ModuleList(attention(**kwargs) for _ in range(2))
        self.mlps = nn.ModuleList(mlp() for _ in range(2))
        perturb(self)

    def forward(self, x):
        x = self.stem(x)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            out = attention(x)
            x = x + (out[0] if isinstance(out, tuple) else out)
            x = x + mlp(x)
        return self.head(x.mean(1))


class Talking(Fused):
    """Mixes the heads before the softmax, so none can be removed."""

    def build(self, *args):
        super().build(*args)
        self.mix = nn.Parameter(torch.randn(self.heads, self.heads))

    def forward(self, x):
        q, k, v = (self.split(t) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        weights = torch.einsum("bhij,hg->bgij", q @ k.transpose(-2, -1), self.mix).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Bypass(HeadFirst):
    """Passes its weights to a function and does not call the layer, so no gate can be applied."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return F.linear(attend(q, k, v), self.proj.weight, self.proj.bias)


class Uneven(Fused):
    """The last layers do not have the heads as their input."""

    def build(self, *args):
        super().build(*args)
        self.after = nn.Linear(DIM, 7)
        self.back = nn.Linear(7, DIM)

    def forward(self, x):
        return self.back(self.after(super().forward(x)))


class CausalSelfAttention(nn.Module):
    """The attention of nanoGPT. Its forward assumes that the heads together are the hidden size."""

    def __init__(self, n_head=4, n_embd=DIM):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
