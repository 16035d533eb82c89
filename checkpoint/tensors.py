"""The tensors of a Hugging Face checkpoint: which ones a model needs, and where each one goes.

Names and shapes [out_features, in_features] are those of Hugging Face. A folder that quantize.py
wrote holds the tensors for which `is_quantized` as int8, and the scales of each, float32
[out_features], as NAME_scale.
"""

import math

import torch

from model import SITES

METHOD = "nanoteal-int8"  # quant_method in the config.json of quantize.py's folders
LOADERS = {"weight": "load_weight", "bias": "load_bias", "weight_scale": "load_scale"}


def is_quantized(name):
    """Whether the tensor of this name is one that becomes int8: a block's matrix or the head."""
    return name.endswith("_proj.weight") or name == "lm_head.weight"


def norm_places(config):
    """{name in a Hugging Face block: attribute of `Block`} of a block's norms."""
    places = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    if config.norms_behind:
        places = {"post_attention_layernorm": "attn_norm",
                  "post_feedforward_layernorm": "mlp_norm"}
    if config.qk_norm:
        places |= {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
    return places


def tensor_shapes(config, quantized=False):
    """{name: shape} of every tensor that a model of this config needs."""
    embedding = (config.vocab_size, config.hidden_size)
    shapes = {"model.embed_tokens.weight": embedding, "model.norm.weight": embedding[1:]}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = embedding
    for i in range(config.n_layers):
        for norm, place in norm_places(config).items():
            heads = {"q_norm": config.n_heads, "k_norm": config.n_kv_heads}.get(place)
            size = config.hidden_size if heads is None else config.head_dim * (
                heads if config.qk_norm == "all" else 1)
            shapes[f"model.layers.{i}.{norm}.weight"] = (size,)
        for site, names in SITES.items():
            in_features, widths = config.linear_shape(site)
            module = "self_attn" if site in ("qkv", "o") else "mlp"
            has_bias = {"qkv": config.qkv_bias, "o": config.o_bias}.get(site, False)
            for name, width in zip(names, widths):
                shapes[f"model.layers.{i}.{module}.{name}_proj.weight"] = (width, in_features)
                if has_bias:
                    shapes[f"model.layers.{i}.{module}.{name}_proj.bias"] = (width,)
    if quantized:
        scales = {f"{name}_scale": s[:1] for name, s in shapes.items() if is_quantized(name)}
        shapes |= scales
    return shapes


def check_shapes(config, found, quantized=False):
    """Compare {name: shape} of a checkpoint with what its config needs; returns the needed ones.

    Raises ValueError, naming the tensor.
    """
    needed = tensor_shapes(config, quantized)
    for name, shape in needed.items():
        if name not in found:
            raise ValueError(f"tensor {name} is missing; is the model complete, and of the "
                             "architecture it names?")
        if found[name] != shape:
            raise ValueError(f"tensor {name} has shape {list(found[name])[:8]}; the config asks "
                             f"for {list(shape)}")
    for name in sorted(found.keys() - needed.keys()):
        # Old checkpoints hold RoPE's frequencies. Some hold a tied head a second time.
        if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
            raise ValueError(f"unexpected tensor {name[:100]!r}; this architecture has no use "
                             "for it")
    return needed


def weight_bytes(config, dtype, quantized=False):
    """Bytes of memory that the weights of a Model take; quantized: None, "int8" or "int4"."""
    shapes = tensor_shapes(config, quantized)
    sizes = {name: math.prod(s) for name, s in shapes.items()}
    if quantized:  # a head of its own, even if the embedding is tied
        sizes["lm_head.weight"] = config.vocab_size * config.hidden_size
    if quantized == "int4":  # 4 bits, and 32 for 32 columns; never the head (int4.py)
        for name, shape in shapes.items():
            if name.endswith("_proj.weight") and shape[0] % 32 == 0:
                sizes[name] = sizes[name] * 5 // 8
    return sum(n if quantized and is_quantized(name) else n * dtype.itemsize
               for name, n in sizes.items())


def put(model, name, tensor):
    """Copy one checkpoint tensor to its place in a Model, cast to the model's dtype.

    Raises ValueError, naming the tensor, if the model has no such tensor, its shape differs, or
    it holds weights that are infinite, NaN or too large for the dtype.
    """
    shape = tensor_shapes(model.config, model.lm_head.scale is not None).get(name)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}; the config asks for "
                         f"{shape}")
    tensor = tensor.to(model.device)
    if tensor.is_floating_point():
        check_range(name, tensor, model.dtype)
    module, _, kind = name.rpartition(".")
    if module == "model.norm":
        model.norm.copy_(tensor)
    elif module == "model.embed_tokens":
        if model.embedding is not None:
            model.embedding.copy_(tensor)
        if model.config.tie_embeddings:
            model.lm_head.load_weight(0, tensor)
    elif module == "lm_head":
        getattr(model.lm_head, LOADERS[kind])(0, tensor)
    else:  # model.layers.3.self_attn.q_proj
        _, _, i, part = module.split(".", 3)
        block, norms = model.blocks[int(i)], norm_places(model.config)
        if part in norms:
            getattr(block, norms[part]).copy_(tensor)
        else:
            part = part.rpartition(".")[2].removesuffix("_proj")
            site = next(site for site, names in SITES.items() if part in names)
            load = getattr(getattr(block, site), LOADERS[kind])
            load(SITES[site].index(part), tensor)


def check_range(name, tensor, dtype):
    """Raise ValueError if a weight is infinite, NaN or too large for the dtype."""
    low, high = (extreme.item() for extreme in tensor.aminmax())  # NaN if any weight is
    largest = torch.finfo(dtype).max
    if not -largest <= low <= high <= largest:
        overflow = math.isfinite(low + high) and dtype == torch.float16
        advice = "try --dtype bfloat16" if overflow else "get a sound checkpoint"
        raise ValueError(f"tensor {name} holds weights from {low:g} to {high:g}, and {dtype} "
                         f"ends at {largest:g}; {advice}")
