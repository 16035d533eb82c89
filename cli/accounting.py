"""The bytes that a decode step reads: of the blocks, of everything else, and of the KV cache."""

import torch

from cpu.packed import PackedLinear


def cache_bytes(config, dtype):
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize


def tokens_attended(config, n_tokens):
    """How many of n_tokens cached tokens attention reads, averaged over layers."""
    return sum(min(n_tokens, config.window(i) or n_tokens)
               for i in range(config.n_layers)) / config.n_layers


def tensors(thing):
    """The tensors that an object holds itself, such as a `Linear`'s, and its parts' if it is a
    `PackedLinear`."""
    own = [value for value in vars(thing).values() if isinstance(value, torch.Tensor)]
    return own + [tensor for part in getattr(thing, "parts", ()) for tensor in tensors(part)]


def bytes_per_weight(linear, i):
    """Bytes that decoding reads for one weight of a kept row of projection i, scales within the row
    included."""
    if isinstance(linear, PackedLinear):
        return linear.parts[i].words.nbytes / linear.in_features / linear.widths[i]
    # matrices go by row (weights, int4's scales); vectors are read whole
    by_row = sum(tensor.nbytes for tensor in tensors(linear) if tensor.dim() > 1)
    return by_row / linear.in_features / linear.ends[-1]


def other_bytes(model):
    """Bytes of weights that every step reads besides the blocks' rows: the LM head, norms, biases,
    the scales of columns and of groups of rows, and one row of an untied embedding."""
    holders = [*model.blocks, *model.linears()]
    vectors = [tensor for holder in holders for tensor in tensors(holder) if tensor.dim() == 1]
    of_groups = [tensor for linear in model.linears() for part in getattr(linear, "parts", ())
                 for tensor in (part.scale, part.minimum) if tensor is not None]
    one = torch.tensor([0])  # a Packed embedding takes only tensors of ids
    embedding = [] if model.embedding is None else [model.embedding[one]]
    every_step = [*vectors, *of_groups, *tensors(model.lm_head), model.norm, *embedding]
    return sum(tensor.nbytes for tensor in every_step)


def block_bytes(model, kept=None):
    """Bytes of the blocks' weights, or of `kept` rows of every projection, int64 [n_layers, 7]."""
    total, kept = 0, None if kept is None else kept.tolist()  # one wait for the GPU
    for linear in model.linears():
        rows = [linear.in_features] * len(linear.widths)
        if kept is not None:
            rows = kept[linear.layer][linear.places]
        total += sum(n * width * bytes_per_weight(linear, i)
                     for i, (n, width) in enumerate(zip(rows, linear.widths)))
    return total
