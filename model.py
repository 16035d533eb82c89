"""The Llama forward pass, written by hand: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, KV cache.

Every family this project runs (Llama-2, Llama-3, Mistral, Qwen2, SmolLM, ...) is the same stack of blocks with other
numbers in its `Config`. A block reads seven weight matrices: q, k, v, o, gate, up, down. They are stored once,
transposed as `w_t [in, out]`, so that input channel k owns one contiguous row: multiplying by x, a row whose x[k] is
dropped need not be read at all (`sparse_gemv.py`). q|k|v share their input and so do gate|up, so each group is one
fused matrix. All products with these weights go through one function, `project(x, projection)`: `dense` below in
prefill, a sparse one while decoding, a recording one while calibrating. Tensors carry no batch dimension, for this
engine decodes a single stream: hidden states are [T, hidden_size], T tokens long.

Sources: Touvron et al., "Llama 2" (arXiv:2307.09288, section 2.2); Su et al., "RoFormer" (arXiv:2104.09864);
Ainslie et al., "GQA" (arXiv:2305.13245); Shazeer, "GLU Variants" (arXiv:2002.05202).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from memory import require_memory
from quantize import empty_packed, is_quantized, pack, quantize_tensor, unpack

# The four points of a block where a hidden state meets weights, and the projections that read it there.
SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
PROJECTIONS = tuple(name for names in SITES.values() for name in names)

PIECE = 1 << 24  # weights of an int8 matrix that prefill turns into floats at a time

# model_type in config.json -> architecture name there.
SUPPORTED = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(frozen=True)
class Config:
    """The numbers that make one model of the family; sizes count elements, `context` counts tokens."""

    architecture: str  # "llama", "mistral" or "qwen2"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ..., ...}
    context: int = 2048
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    qkv_bias: bool = False
    o_bias: bool = False
    tie_embeddings: bool = False

    @classmethod
    def from_hf(cls, config):
        """Read the dictionary of a Hugging Face config.json (both spellings of the rotary settings).

        Raises ValueError, one sentence naming the key and its value, for whatever this forward pass does not
        compute or no real model has: a wrong number here would otherwise mean silently wrong text.
        """
        model_type = str(config.get("model_type"))
        architectures = config.get("architectures") or [SUPPORTED.get(model_type)]
        if (not isinstance(architectures, list) or model_type not in SUPPORTED
                or SUPPORTED[model_type] not in architectures):
            raise ValueError(f"unsupported architecture: model_type {model_type!r}, architectures {architectures!r}; "
                             f"supported are {', '.join(SUPPORTED.values())}")

        def number(key, default=None, low=1, high=1 << 20, kind=int):
            value = config.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
                raise ValueError(f"config value {key} is {value!r}; expected {kind.__name__} from {low} to {high}")
            return kind(value)

        n_heads = number("num_attention_heads", high=1024)
        n_kv_heads = number("num_key_value_heads", n_heads, high=1024)
        hidden_size = number("hidden_size")
        head_dim = number("head_dim", hidden_size // n_heads, high=1024)
        if n_heads % n_kv_heads:
            raise ValueError(f"config value num_key_value_heads is {n_kv_heads}, which does not divide "
                             f"num_attention_heads {n_heads}")
        if head_dim % 2:
            raise ValueError(f"config value head_dim is {head_dim}; rotary embedding needs an even number")

        for key, wanted in (("hidden_act", "silu"), ("mlp_bias", False), ("partial_rotary_factor", 1.0)):
            if config.get(key, wanted) not in (wanted, None):
                raise ValueError(f"config value {key} is {config[key]!r}; only {wanted!r} is supported")
        if config.get("use_sliding_window"):
            raise ValueError("config value use_sliding_window is true; a window on some of the layers is not supported")

        # Newer configs put everything about RoPE in rope_parameters, older ones in rope_theta and rope_scaling.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict) or any(isinstance(value, (dict, list)) for value in rope.values()):
            raise ValueError(f"config value rope_scaling is {rope!r}; expected one flat object for all layers")
        config = config | rope
        rope_type = str(rope.get("rope_type", rope.get("type", "default")))
        scaling_keys = {"default": (), "linear": ("factor",), "llama3": (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if rope_type not in scaling_keys:
            raise ValueError(f"rope scaling type {rope_type!r} is not supported; supported are default, linear, llama3")
        scaling = {key: number(key, low=1e-3, high=1e8, kind=float) for key in scaling_keys[rope_type]}
        if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(f"config value low_freq_factor is {scaling['low_freq_factor']}; "
                             f"it must be below high_freq_factor {scaling['high_freq_factor']}")

        def flag(key):
            value = config.get(key)
            if value not in (None, True, False):  # the text "false" would count as true
                raise ValueError(f"config value {key} is {value!r}; expected true or false")
            return bool(value)

        attention_bias = flag("attention_bias")
        return cls(
            architecture=model_type,
            vocab_size=number("vocab_size", high=1 << 22),
            hidden_size=hidden_size,
            intermediate_size=number("intermediate_size"),
            n_layers=number("num_hidden_layers", high=1024),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            norm_eps=number("rms_norm_eps", 1e-6, low=0.0, high=1.0, kind=float),
            rope_theta=number("rope_theta", 10000.0, low=1.0, high=1e12, kind=float),
            rope_scaling={"rope_type": rope_type, **scaling} if scaling else None,
            context=number("max_position_embeddings", 2048, high=1 << 24),
            sliding_window=number("sliding_window", high=1 << 24)
            if model_type == "mistral" and config.get("sliding_window") is not None else None,
            qkv_bias=attention_bias or model_type == "qwen2",
            o_bias=attention_bias and model_type == "llama",
            tie_embeddings=flag("tie_word_embeddings"),
        )

    def shapes(self, site):
        """(in_features, widths of the matrices fused at this site)."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {"qkv": (self.hidden_size, (q, kv, kv)),
                "o": (q, (self.hidden_size,)),
                "gate_up": (self.hidden_size, (self.intermediate_size,) * 2),
                "down": (self.intermediate_size, (self.hidden_size,))}[site]


def tensor_shapes(config, quantized=False):
    """Every tensor a checkpoint of this config must hold: {Hugging Face name: shape in its [out, in] orientation}.

    If it is `quantized`, it also holds the scales of its int8 tensors.
    """
    embedding = (config.vocab_size, config.hidden_size)
    shapes = {"model.embed_tokens.weight": embedding, "model.norm.weight": (config.hidden_size,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = embedding
    for i in range(config.n_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (config.hidden_size,)
        for site, names in SITES.items():
            in_features, widths = config.shapes(site)
            block = "self_attn" if site in ("qkv", "o") else "mlp"
            has_bias = {"qkv": config.qkv_bias, "o": config.o_bias}.get(site, False)
            for name, width in zip(names, widths):
                shapes[f"model.layers.{i}.{block}.{name}_proj.weight"] = (width, in_features)
                if has_bias:
                    shapes[f"model.layers.{i}.{block}.{name}_proj.bias"] = (width,)
    if quantized:
        shapes |= {f"{name}_scale": shape[:1] for name, shape in shapes.items() if is_quantized(name)}
    return shapes


class Projection:
    """One fused matrix of a block, stored transposed: y = x @ w_t + bias, y's columns being its parts side by side.

    Quantized, y = (x @ w_t) * scale + bias: w_t holds int8, on a CPU packed as its fast product wants it (quantize.py).
    """

    def __init__(self, layer, site, in_features, widths, has_bias, dtype, device, quantize=None):
        self.layer, self.site = layer, site
        self.widths = widths  # of the parts: (q, k, v), (o,), (gate, up) or (down,)
        self.ends = tuple(sum(widths[:i + 1]) for i in range(len(widths)))  # last column + 1 of each part
        n = self.ends[-1]
        if quantize and torch.device(device).type == "cpu":
            self.w_t = empty_packed(in_features, self.ends, narrow=site == "lm_head")  # uint8 [blocks, K, columns + 8]
        else:
            self.w_t = torch.empty(in_features, n, dtype=torch.int8 if quantize else dtype, device=device)  # [K, N]
        self.scale = torch.empty(n, device=device) if quantize else None  # float32 [N]
        self.bias = torch.zeros(n, dtype=dtype, device=device) if has_bias else None  # [N]

    def put(self, name, start, tensor):
        """Write a part's weight [n, K] (floats or int8), weight_scale [n] or bias [n], columns from `start` on."""
        columns = slice(start, start + tensor.shape[0])
        if name.endswith(".bias"):
            self.bias[columns] = tensor
        elif name.endswith(".weight_scale"):
            self.scale[columns] = tensor
        elif self.scale is None:
            self.w_t[:, columns] = tensor.to(self.w_t.dtype).T
        else:
            q = tensor
            if tensor.dtype != torch.int8:
                q, self.scale[columns] = quantize_tensor(tensor, name)
            if self.w_t.dtype == torch.uint8:
                pack(self.w_t, start, q)
            else:
                self.w_t[:, columns] = q.T

    def weight(self, start, end, dtype):
        """The columns start ... end - 1, [K, end - start], as the numbers they stand for."""
        if self.scale is None:
            return self.w_t[:, start:end]
        q = unpack(self.w_t, start, end) if self.w_t.dtype == torch.uint8 else self.w_t[:, start:end]
        return torch.mul(q, self.scale[start:end], out=torch.empty(q.shape, dtype=dtype, device=q.device))


def dense(x, p):
    """x [T, K] times a whole projection -> [T, N]."""
    if p.scale is None:
        y = x @ p.w_t
    else:  # some columns at a time: all of them as floats could be the largest thing in memory
        width = p.w_t.shape[2] - 8 if p.w_t.dtype == torch.uint8 else 1
        step = max(1, PIECE // (x.shape[1] * width)) * width
        y = torch.cat([x @ p.weight(i, min(i + step, p.ends[-1]), x.dtype) for i in range(0, p.ends[-1], step)], dim=-1)
    return y if p.bias is None else y + p.bias


class Layer:
    """The weights of one transformer block."""

    def __init__(self, i, config, dtype, device, quantize):
        def projection(site, has_bias=False):
            return Projection(i, site, *config.shapes(site), has_bias, dtype, device, quantize)

        self.attn_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.qkv = projection("qkv", config.qkv_bias)
        self.o = projection("o", config.o_bias)
        self.mlp_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.gate_up = projection("gate_up")
        self.down = projection("down")


def weight_bytes(config, dtype, quantize=None):
    """Bytes of memory that a model's weights take."""
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(config, quantize is not None).items()}
    if quantize is not None and config.tie_embeddings:
        sizes["lm_head.weight"] = config.vocab_size * config.hidden_size  # of its own then
    return sum(n * (1 if quantize is not None and is_quantized(name) else dtype.itemsize) for name, n in sizes.items())


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for `context` tokens.

    Raises ValueError if the device has no room for them.
    """

    def __init__(self, config, context, dtype=torch.float32, device="cpu"):
        require_memory(context * self.token_bytes(config, dtype), device, f"a context of {context} tokens",
                       "try a shorter one with --context" + ("" if dtype.itemsize == 2 else " or --dtype bfloat16"))
        shape = (config.n_layers, config.n_kv_heads, context, config.head_dim)
        # zeros, not empty: a masked position still enters the softmax's product, and 0 * NaN is NaN
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.context = context
        self.length = 0  # tokens held

    @staticmethod
    def token_bytes(config, dtype):
        """Bytes that the key and value of one token take."""
        return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize


def rope_frequencies(config, device="cpu"):
    """Rotary angle per position of each pair of head channels, float32 [head_dim / 2].

    `linear` divides all of them by a factor; `llama3` (Llama 3.1's release) divides the slow ones, whose wavelength
    exceeds the original context, keeps the fast ones and blends in between.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling is not None:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies.to(device)


def rms_norm(x, weight, eps):
    """x / rms(x), float32 inside, times weight: the LayerNorm of (x, -x), whose mean is 0; PyTorch has that fused."""
    return F.layer_norm(torch.cat((x, -x), -1), (2 * x.shape[-1],), eps=eps)[..., :x.shape[-1]] * weight


def rotate(x, cos, sin):
    """Rotary embedding: turn channel pair (j, j + head_dim/2) by its angle; x [T, heads, head_dim].

    cos and sin are float32 [T, 1, head_dim], the sign of the rotation already in sin: with x = (a, b) this is
    (a cos - b sin, b cos + a sin), computed in float32.
    """
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


class Model:
    """A Llama-family model: weights and the forward pass over them. Fresh weights are uninitialised; `put` fills them.

    With quantize="int8" the projections and the LM head are int8 with scales, made from whatever `put` is given.
    """

    def __init__(self, config, dtype=torch.float32, device="cpu", quantize=None):
        self.config, self.dtype, self.device, self.quantize = config, dtype, torch.device(device), quantize
        self.shapes = tensor_shapes(config, quantize is not None)
        # The LM head is stored transposed like every other matrix; a tied embedding is then its columns, unless they
        # are quantized: the look-up keeps its precision.
        self.lm_head = Projection(
            None, "lm_head", config.hidden_size, (config.vocab_size,), False, dtype, device, quantize)
        self.embedding = None if config.tie_embeddings and quantize is None else torch.empty(
            config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = [Layer(i, config, dtype, device, quantize) for i in range(config.n_layers)]
        self.norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.frequencies = rope_frequencies(config, device)

    def put(self, name, tensor):
        """Copy one checkpoint tensor (Hugging Face name and [out, in] orientation) to its place, cast to our dtype.

        Raises ValueError, naming the tensor, if the model has no such tensor, its shape differs, or it holds infinite
        or NaN weights, or such as `dtype` cannot hold.
        """
        shape = self.shapes.get(name)
        if shape is None or tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}; the config asks for {shape}")
        tensor = tensor.to(self.device)
        if tensor.is_floating_point():
            low, high = (extreme.item() for extreme in tensor.aminmax())  # NaN if any weight is
            largest = torch.finfo(self.dtype).max
            if not -largest <= low <= high <= largest:
                too_small = math.isfinite(low + high) and self.dtype == torch.float16
                raise ValueError(f"tensor {name} holds weights from {low:g} to {high:g}, and {self.dtype} ends at "
                                 f"{largest:g}; " + ("try --dtype bfloat16" if too_small else "get a sound checkpoint"))
        if name == "model.norm.weight":
            self.norm.copy_(tensor)
        elif name == "model.embed_tokens.weight":
            if self.embedding is not None:
                self.embedding.copy_(tensor)
            if self.config.tie_embeddings:
                self.lm_head.put(name, 0, tensor)
        elif name.startswith("lm_head."):
            self.lm_head.put(name, 0, tensor)
        else:
            _, _, index, *_, part, _ = name.split(".")  # model.layers.3.self_attn.q_proj.weight
            layer = self.layers[int(index)]
            if part.endswith("_layernorm"):
                (layer.attn_norm if part == "input_layernorm" else layer.mlp_norm).copy_(tensor)
            else:
                part = part.removesuffix("_proj")
                site = next(site for site, names in SITES.items() if part in names)
                p = getattr(layer, site)
                p.put(name, p.ends[SITES[site].index(part)] - tensor.shape[0], tensor)

    def block_bytes(self, kept=None):
        """Bytes of the blocks' weights, or of `kept` rows of every projection, int64 [n_layers, 7]."""
        rows, row_bytes = [], []
        for site in SITES:
            in_features, widths = self.config.shapes(site)
            itemsize = getattr(self.layers[0], site).w_t.element_size()
            rows += [in_features] * len(widths)
            row_bytes += [width * itemsize for width in widths]
        n_rows = torch.tensor(rows) * len(self.layers) if kept is None else kept.cpu().sum(0)  # [7]
        return (n_rows * torch.tensor(row_bytes)).sum().item()

    def embed(self, tokens):
        """Token ids [T] -> hidden states [T, hidden_size]."""
        if self.embedding is None:
            return self.lm_head.w_t.index_select(1, tokens).T.contiguous()
        return self.embedding[tokens]

    def rope(self, start, n_tokens):
        """cos and sin, float32 [T, 1, head_dim], from position `start` on, sin signed as `rotate` wants."""
        positions = torch.arange(start, start + n_tokens, device=self.device, dtype=torch.float32)
        angles = torch.outer(positions, self.frequencies)[:, None]  # [T, 1, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def attention(self, q, k, v):
        """Causal attention of the newest T tokens, q [T, n_heads, head_dim], over S: k, v [n_kv_heads, S, head_dim];
        -> [T, n_heads * head_dim].
        """
        config, (n_kv, n_keys, head_dim), n_tokens = self.config, k.shape, q.shape[0]
        window = config.sliding_window
        if n_tokens == 1:
            # The query heads that share a key head are this head's rows: no mask, no copies of k and v.
            start = 0 if window is None else max(0, n_keys - window)
            q = q.view(n_kv, config.n_heads // n_kv, head_dim)
            return F.scaled_dot_product_attention(q[None], k[None, :, start:], v[None, :, start:]).reshape(1, -1)
        mask = None
        if n_keys > n_tokens or (window is not None and n_keys > window):
            distance = (torch.arange(n_keys - n_tokens, n_keys, device=q.device)[:, None]
                        - torch.arange(n_keys, device=q.device))  # [T, S]
            mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask,
                                           is_causal=mask is None, enable_gqa=n_kv != config.n_heads)
        return y[0].transpose(0, 1).flatten(1)

    def block(self, layer, x, rope, cache=None, project=dense):
        """One transformer block: x [T, hidden_size] -> [T, hidden_size]. Without a cache, x is the whole sequence."""
        config, n_tokens = self.config, x.shape[0]
        h = rms_norm(x, layer.attn_norm, config.norm_eps)
        qkv = project(h, layer.qkv).view(n_tokens, -1, config.head_dim)  # heads of q, then k, then v
        v = qkv[:, -config.n_kv_heads:].transpose(0, 1)  # k, v [n_kv_heads, T, head_dim]
        q, k = rotate(qkv[:, :-config.n_kv_heads], *rope).split((config.n_heads, config.n_kv_heads), 1)
        k = k.transpose(0, 1)
        if cache is not None:
            i, start, end = layer.qkv.layer, cache.length, cache.length + n_tokens
            cache.k[i, :, start:end] = k
            cache.v[i, :, start:end] = v
            k, v = cache.k[i, :, :end], cache.v[i, :, :end]
        x = x + project(self.attention(q, k, v), layer.o)

        h = rms_norm(x, layer.mlp_norm, config.norm_eps)
        gate, up = project(h, layer.gate_up).chunk(2, dim=-1)
        return x + project(F.silu(gate) * up, layer.down)

    def forward(self, tokens, cache=None, project=dense):
        """Token ids [T] -> final hidden states [T, hidden_size] (normalised, ready for `logits`).

        With a cache the tokens follow those it holds, and are added to it; T > 1 is prefill, T = 1 is decoding.
        Raises ValueError when they do not fit into the cache.
        """
        start, n_tokens = (0 if cache is None else cache.length), tokens.shape[0]
        if cache is not None and start + n_tokens > cache.context:
            raise ValueError(f"{start + n_tokens} tokens do not fit into a KV cache of {cache.context}")
        rope = self.rope(start, n_tokens)
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.block(layer, x, rope, cache, project)
        if cache is not None:
            cache.length += n_tokens
        return rms_norm(x, self.norm, self.config.norm_eps)

    def logits(self, hidden, project=dense):
        """Final hidden states [T, hidden_size] -> next-token logits [T, vocab_size]."""
        return project(hidden, self.lm_head)
