"""The Llama forward pass in plain PyTorch, and TEAL's idea: skip the weights that hardly matter.

Llama, Mistral, Qwen, SmolLM, OLMo and many others are a stack of identical blocks; only the
numbers in `Config` differ. Every product with weights goes through one function, `project(x,
linear)`: `dense` reads every weight, `masked` first drops the entries of x within a threshold.
Prefill, which reads a prompt at once, is dense. While decoding, which adds one token at a time, a
kernel that computes the same as `masked` skips the weights that belong to dropped entries
(`sparse_gemv.py`). The engine runs one text at a time, so no tensor has a batch dimension: T is
the number of new tokens, S the number of tokens that attention sees.

Sources on arXiv: Llama 2 (2307.09288, section 2.2), RoPE (2104.09864), grouped-query attention
(2305.13245), SwiGLU (2002.05202), TEAL (2408.14690). This file needs only torch.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

# A block multiplies with weights at four sites. The projections of one site read the same input.
SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Config:
    """The numbers in which models differ."""

    vocab_size: int
    hidden_size: int  # channels of the residual stream, to which every block adds
    intermediate_size: int  # channels inside the MLP
    n_layers: int
    n_heads: int  # of queries
    n_kv_heads: int  # of keys and values; fewer than n_heads is grouped-query attention
    head_dim: int  # channels of one head
    norm_eps: float = 1e-5  # keeps RMSNorm from dividing by zero
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    context: int = 2048  # longest text, in tokens
    tie_embeddings: bool = False  # the LM head is the embedding

    # What Llama 2 does not have, and later releases and other families set. Skip it at first,
    # with the next two methods.
    rope_divisors: tuple = ()  # stretch RoPE's wavelengths, one per pair; () means 1 for all
    rope_factor: float = 1.0  # multiplies rotated q and k, so scores by its square (YaRN, Granite)
    plain_rope_layers: tuple = ()  # layers whose RoPE both of these leave alone (OLMo 3)
    no_rope_layers: tuple = ()  # layers without RoPE (SmolLM3)
    query_growth: tuple = (0.0, 1)  # (b, c): q times 1 + b ln(1 + position // c) (Ministral 3)
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    full_layers: tuple = ()  # layers that see all tokens, when others have the window
    qk_norm: str | None = None  # RMSNorm of q and k: each "head" by itself, or "all" together
    norms_after: bool = False  # RMSNorm after attention and MLP, not before them (OLMo 2)
    qkv_bias: bool = False
    o_bias: bool = False

    def window(self, i):
        """The sliding window of layer i, or None."""
        return None if i in self.full_layers else self.sliding_window

    def rope_kind(self, i):
        """What RoPE does in layer i: "plain", "none", or "scaled" by divisors and factor."""
        if i in self.no_rope_layers:
            return "none"
        scales = self.rope_divisors or self.rope_factor != 1
        return "scaled" if scales and i not in self.plain_rope_layers else "plain"

    def linear_shape(self, site):
        """(in_features, out_features of each projection) of the matrices at a site."""
        h, mlp = self.hidden_size, self.intermediate_size
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {"qkv": (h, (q, kv, kv)), "o": (q, (h,)),
                "gate_up": (h, (mlp, mlp)), "down": (mlp, (h,))}[site]


# ---- Two products, and the idea of TEAL --------------------------------------------------------

def dense(x, linear):
    """x [T, K] -> [T, N] through a site's matrix (a `Linear`, below), reading every weight."""
    return linear(x)


def masked(x, linear, thresholds):
    """TEAL: x [T, K] without its nearly zero entries -> [T, N]; one threshold per projection.

    Where |x[k]| <= threshold, column k of W is multiplied by zero, so a kernel need not read it.
    """
    # compared in float32; a NaN is not <= a threshold, so it is kept and stays visible
    y = torch.cat([
        multiply(torch.where(x.float().abs() <= threshold, 0, x), linear.weight(start, end))
        for threshold, start, end in zip(thresholds, linear.starts, linear.ends)], dim=-1)
    return y if linear.bias is None else y + linear.bias


# ---- The block ---------------------------------------------------------------------------------

class Block:
    """One transformer block: attention, then the MLP, each added to the residual stream."""

    def __init__(self, i, config, dtype, device, linear_class):
        def make(site, has_bias=False):
            return linear_class(i, site, *config.linear_shape(site), has_bias, dtype, device)

        self.i, self.config = i, config
        new_norm = partial(torch.empty, dtype=dtype, device=device)
        self.attn_norm, self.mlp_norm = new_norm(config.hidden_size), new_norm(config.hidden_size)
        if config.qk_norm:
            n_q, n_k = {"head": (1, 1), "all": (config.n_heads, config.n_kv_heads)}[config.qk_norm]
            self.q_norm = new_norm(n_q * config.head_dim)
            self.k_norm = new_norm(n_k * config.head_dim)
        self.qkv, self.o = make("qkv", config.qkv_bias), make("o", config.o_bias)
        self.gate_up, self.down = make("gate_up"), make("down")

    def attention(self, x, ropes, cache, project):
        """Causal attention of the T new tokens over all S tokens so far. ropes: {kind:
        (cos, sin, growth)}, by `Model.rope`; project: `dense`, or `masked` with thresholds."""
        config = self.config
        q, k, v = project(x, self.qkv).split(self.qkv.widths, dim=-1)
        if config.qk_norm:
            q = rms_norm(q, self.q_norm, config.norm_eps)
            k = rms_norm(k, self.k_norm, config.norm_eps)
        q, k, v = (y.unflatten(-1, (-1, config.head_dim)) for y in (q, k, v))  # [T, heads, ...]
        cos, sin, growth = ropes[config.rope_kind(self.i)]  # growth is 1 in all but Ministral 3
        q, k = apply_rope(q, cos * growth, sin * growth), apply_rope(k, cos, sin)
        q, k, v = (y.transpose(0, 1) for y in (q, k, v))  # [heads, T, head_dim]
        if cache is not None:
            k, v = cache.append(self.i, k, v)  # [n_kv_heads, S, head_dim]
        mask = causal_mask(len(x), k.shape[1], config.window(self.i), x.device)  # [T, S]
        # enable_gqa: each key head serves n_heads / n_kv_heads query heads
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask,
                                           is_causal=mask is None, enable_gqa=True)[0]
        return project(y.transpose(0, 1).flatten(1), self.o)

    def mlp(self, x, project):
        """SwiGLU: silu(gate) decides how much of each of up's channels goes on to down."""
        gate, up = project(x, self.gate_up).chunk(2, dim=-1)
        return project(F.silu(gate) * up, self.down)

    def __call__(self, x, ropes, cache=None, project=dense):
        """x [T, hidden_size] -> [T, hidden_size]. Without a cache, x is the whole text."""
        eps = self.config.norm_eps
        x = x + self.attention(rms_norm(x, self.attn_norm, eps), ropes, cache, project)
        return x + self.mlp(rms_norm(x, self.mlp_norm, eps), project)


class PostNormBlock(Block):
    """OLMo 2's block: the norms come after attention and MLP, not before them."""

    def __call__(self, x, ropes, cache=None, project=dense):
        eps = self.config.norm_eps
        x = x + rms_norm(self.attention(x, ropes, cache, project), self.attn_norm, eps)
        return x + rms_norm(self.mlp(x, project), self.mlp_norm, eps)


def causal_mask(n_tokens, n_keys, window, device):
    """The keys that the newest T of S tokens see: bool [T, S]; None for the plain triangle."""
    if n_tokens == n_keys and (window is None or n_keys <= window):
        return None
    position = torch.arange(n_keys - n_tokens, n_keys, device=device)[:, None]
    distance = position - torch.arange(n_keys, device=device)
    return (distance >= 0) & (distance < (window or n_keys))


def rms_norm(x, weight, eps):
    """Scale each group of n channels of x [..., C] to a root mean square of 1, times weight [n]."""
    return F.rms_norm(x.unflatten(-1, (-1, len(weight))), weight.shape, weight, eps).flatten(-2)


def apply_rope(x, cos, sin):
    """Rotate the pairs of channels (j, j + head_dim / 2) of x [T, heads, head_dim], in float32."""
    a, b = x.chunk(2, dim=-1)
    # addcmul adds a product in one pass: a * cos - b * sin, b * cos + a * sin
    rotated = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat([half.to(x.dtype) for half in rotated], dim=-1)


# ---- Weights, KV cache and model ---------------------------------------------------------------

def cpu_dtype(dtype):
    """The dtype in which this CPU multiplies fast: 16 bits can take 40 times as long as 32."""
    fast = dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return dtype if fast else torch.float32


def multiply(x, w):
    """x [T, K] @ w [K, N], both of the same dtype."""
    if x.device.type != "cpu" or cpu_dtype(x.dtype) == x.dtype:
        return x @ w
    pieces = w.split(max(1, (1 << 20) // len(w)), dim=1)  # each stays in the CPU's cache
    return torch.cat([x.float() @ piece.float() for piece in pieces], dim=-1).to(x.dtype)


class Linear:
    """The projections of one site in one matrix: y = x @ w_t + bias, their outputs side by side.

    W [N, K] is stored transposed, as w_t [K, N]: x[k] multiplies row k, which is contiguous in
    memory and skipped if x[k] is dropped. `places` is the slice of PROJECTIONS that this site
    holds: it picks the site's part of a layer's 7 thresholds and 7 counts of rows read (decode.py).
    """

    scale = None  # float32 [N], multiplies the sums of int8 weights (quantize.py)

    def __init__(self, layer, site, in_features, widths, has_bias, dtype, device):
        self.layer, self.site, self.in_features, self.dtype = layer, site, in_features, dtype
        self.widths = widths  # out_features of each projection
        self.ends = tuple(sum(widths[:i + 1]) for i in range(len(widths)))  # last column + 1
        self.starts = (0, *self.ends[:-1])
        first = 0 if layer is None else PROJECTIONS.index(SITES[site][0])  # None: the LM head
        self.places = slice(first, first + len(widths))
        self.bias = torch.zeros(self.ends[-1], dtype=dtype, device=device) if has_bias else None
        self.allocate(device)

    def allocate(self, device, dtype=None):
        """Make w_t [K, N] in dtype (int8 by quantize.py), else in self.dtype. An LM head's w_t is
        a view of W [N, K], where a logit is one row (lm_head.py); but not in int8 on a GPU."""
        by_logit = self.site == "lm_head" and (dtype is None or torch.device(device).type == "cpu")
        shape = (self.in_features, self.ends[-1])[::-1 if by_logit else 1]
        w = torch.empty(shape, dtype=dtype or self.dtype, device=device)
        self.w_t = w.T if by_logit else w

    def load_weight(self, i, weight):
        """Copy the weight [out_features, in_features] of projection i to its columns."""
        self.w_t[:, self.starts[i]:self.ends[i]] = weight.to(self.dtype).T

    def load_bias(self, i, bias):
        self.bias[self.starts[i]:self.ends[i]] = bias

    def weight(self, start, end):
        """Columns start ... end - 1 of w_t, [K, end - start]."""
        return self.w_t[:, start:end]

    def __call__(self, x):
        y = multiply(x, self.w_t)
        return y if self.bias is None else y + self.bias


class KVCache:
    """Keys and values of the tokens so far, each computed once; room for `context` tokens."""

    def __init__(self, config, context, dtype=torch.float32, device="cpu"):
        shape = (2, config.n_layers, config.n_kv_heads, context, config.head_dim)
        # zeros: a GPU decoder's trial step reads rows that no token has written; 0 * NaN is NaN
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.context, self.length = context, 0  # in tokens: capacity, and how many it holds

    def append(self, layer, k, v):
        """Store new k, v [n_kv_heads, T, head_dim] -> all so far, [n_kv_heads, S, head_dim]."""
        end = self.length + k.shape[1]
        if end > self.context:
            raise ValueError(f"{end} tokens do not fit in a KV cache of {self.context}")
        self.k[layer, :, self.length:end], self.v[layer, :, self.length:end] = k, v
        return self.k[layer, :, :end], self.v[layer, :, :end]


def rotation(config, kind):
    """RoPE of each pair of channels: radians per position, and a factor; float32 [head_dim / 2].
    Skip all but "plain" at first. A pair that does not rotate has divisor infinity (layers without
    RoPE, a part of Phi-4-mini's head)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    divisors = {"none": torch.inf, "plain": 1.0, "scaled": config.rope_divisors or 1.0}[kind]
    freq = 1.0 / config.rope_theta ** exponents / torch.tensor(divisors)
    return freq, torch.where(freq > 0, config.rope_factor if kind == "scaled" else 1.0, 1.0)


class Model:
    """Weights and forward pass. `checkpoint.load` fills the weights. linear_class: `Linear`, or
    that of quantized weights."""

    def __init__(self, config, dtype=torch.float32, device="cpu", linear_class=Linear):
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.ranks = None  # the processes that share the model, if several do (tensor_parallel.py)
        block = PostNormBlock if config.norms_after else Block
        self.blocks = [block(i, config, dtype, device, linear_class)
                       for i in range(config.n_layers)]
        v, h = config.vocab_size, config.hidden_size
        self.norm = torch.empty(h, dtype=dtype, device=device)
        self.lm_head = linear_class(None, "lm_head", h, (v,), False, dtype, device)
        # A tied embedding shares the LM head's memory, unless the head is in int8 (it has a scale).
        tied = config.tie_embeddings and self.lm_head.scale is None
        self.embedding = None if tied else torch.empty(v, h, dtype=dtype, device=device)
        self.set_context(config)

    def set_context(self, config):
        """Use `config`, which differs from this model's only in context and RoPE."""
        self.config = config
        self.rotations = {kind: [y.to(self.device) for y in rotation(config, kind)]
                          for kind in map(config.rope_kind, range(config.n_layers))}

    def embed(self, tokens):
        """Token ids [T] -> hidden states [T, hidden_size]."""
        return (self.lm_head.w_t.T if self.embedding is None else self.embedding)[tokens]

    def rope(self, start, n_tokens):
        """{kind: (cos, sin [T, 1, head_dim / 2], growth of q [T, 1, 1])} from `start` on."""
        positions = torch.arange(start, start + n_tokens, device=self.device).float()[:, None, None]
        b, c = self.config.query_growth
        growth = 1 + b * (positions // c).log1p()
        return {kind: ((positions * freq).cos() * factor, (positions * freq).sin() * factor, growth)
                for kind, (freq, factor) in self.rotations.items()}

    def forward(self, tokens, cache=None, project=dense):
        """Token ids [T] -> normalised hidden states [T, hidden_size], ready for `logits`.

        With a cache, the tokens follow those that it holds and are added to it: T > 1 is prefill,
        T = 1 is decoding. Raises ValueError if they do not fit.
        """
        x, ropes = self.embed(tokens), self.rope(cache.length if cache else 0, len(tokens))
        for block in self.blocks:
            x = block(x, ropes, cache, project)
        if cache is not None:
            cache.length += len(tokens)
        return rms_norm(x, self.norm, self.config.norm_eps)

    def logits(self, hidden):
        """Hidden states [T, hidden_size] -> logits of the next token, [T, vocab_size]. Dense."""
        return self.lm_head(hidden)

    def linears(self):
        """The matrices of all blocks, in the order in which a token meets them."""
        return [getattr(block, site) for block in self.blocks for site in SITES]
