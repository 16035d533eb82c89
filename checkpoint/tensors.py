"""The tensors of a Hugging Face checkpoint: which ones a model needs, and where each one goes.

Names and shapes [out_features, in_features] are those of Hugging Face. A folder that quantize.py
wrote holds the tensors for which `is_quantized` as int8, and the scales of each, float32
[out_features], as NAME_scale. With int4, most of them are uint8 [out_features / 32, in_features,
20] instead, which quantize.py explains.
"""

import math

import torch

from cpu.packed import Packed
from model import SITES
from quantize import GROUP, GROUP_BYTES, can_be_int4, split_groups

# quant_method in the config.json of quantize.py's folders, and the version of their format
METHODS = {"nanoteal-int8": "int8", "nanoteal-int4": "int4"}
VERSION = 1
LOADERS = {"weight": "load_weight", "bias": "load_bias", "weight_scale": "load_scale"}


def is_quantized(name):
    """Whether the tensor of this name becomes int8 or int4: a block's matrix or the head."""
    return name.endswith("_proj.weight") or name == "lm_head.weight"


def norm_places(config):
    """{name in a Hugging Face block: attribute of `Block`} of a block's norms."""
    places = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    if config.norms_after:
        places = {"post_attention_layernorm": "attn_norm",
                  "post_feedforward_layernorm": "mlp_norm"}
    if config.qk_norm:
        places |= {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
    return places


def tensor_shapes(config, quantized=None):
    """{name: shape} of every tensor that a model of this config needs.

    quantized: None, "int8" or "int4"; a shape with three numbers is that of an int4 tensor
    """
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
            int4 = quantized == "int4" and can_be_int4(site, widths)
            for name, width in zip(names, widths):
                shape = (width // GROUP, in_features, GROUP_BYTES) if int4 else (width, in_features)
                shapes[f"model.layers.{i}.{module}.{name}_proj.weight"] = shape
                if has_bias:
                    shapes[f"model.layers.{i}.{module}.{name}_proj.bias"] = (width,)
    if quantized:
        shapes |= {f"{name}_scale": shape[:1] for name, shape in shapes.items()
                   if is_quantized(name) and len(shape) == 2}
    return shapes


def check_shapes(config, found, quantized=None):
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


def weight_bytes(config, dtype, quantized=None):
    """Bytes of memory that the weights of a Model take; quantized: None, "int8" or "int4"."""
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(config, quantized).items()}
    if quantized:  # a head of its own, even if the embedding is tied
        sizes["lm_head.weight"] = config.vocab_size * config.hidden_size
    return sum(n if quantized and is_quantized(name) else n * dtype.itemsize
               for name, n in sizes.items())


def put(model, name, tensor, *groups):
    """Copy one checkpoint tensor to its place in a Model, cast to the model's dtype.

    groups: the `Groups` of a matrix whose few bits stay as they are (cpu/packed.py)

    Raises ValueError, naming the tensor, if the model has no such tensor, its shape differs, or
    it holds weights that are infinite, NaN or too large for the dtype.
    """
    int4 = tensor.dtype == torch.uint8
    quantized = "int4" if int4 else None if model.lm_head.scale is None else "int8"
    shape = tensor_shapes(model.config, quantized).get(name)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}; the config asks for "
                         f"{shape}")
    tensor = tensor.to(model.device)
    if int4:
        scale, minimum = split_groups(tensor)[1].float().unbind(-1)
        check_range(name, torch.stack((minimum, minimum + 15 * scale)), model.dtype)
    elif tensor.is_floating_point():
        check_range(name, tensor, model.dtype)
    module, _, kind = name.rpartition(".")
    if module == "model.norm":
        model.norm.copy_(tensor)
    elif module == "model.embed_tokens":
        if model.config.tie_embeddings:
            model.lm_head.load_weight(0, tensor, *groups)
        if groups:
            model.embedding = (model.lm_head.parts[0] if model.config.tie_embeddings
                               else Packed(tensor, *groups, model.dtype))
        elif model.embedding is not None:
            model.embedding.copy_(tensor)
    elif module == "lm_head":
        getattr(model.lm_head, LOADERS[kind])(0, tensor, *groups)
    else:  # model.layers.3.self_attn.q_proj
        _, _, i, part = module.split(".", 3)
        block, norms = model.blocks[int(i)], norm_places(model.config)
        if part in norms:
            getattr(block, norms[part]).copy_(tensor)
        else:
            part = part.rpartition(".")[2].removesuffix("_proj")
            site = next(site for site, names in SITES.items() if part in names)
            load = getattr(getattr(block, site), LOADERS[kind])
            load(SITES[site].index(part), tensor, *groups)


def check_range(name, tensor, dtype):
    """Raise ValueError if a weight is infinite, NaN or too large for the dtype."""
    low, high = (extreme.item() for extreme in tensor.aminmax())  # NaN if any weight is
    largest = torch.finfo(dtype).max
    if not -largest <= low <= high <= largest:
        overflow = math.isfinite(low + high) and dtype == torch.float16
        advice = "try --dtype bfloat16" if overflow else "get a sound checkpoint"
        raise ValueError(f"tensor {name} holds weights from {low:g} to {high:g}, and {dtype} "
                         f"ends at {largest:g}; {advice}")
