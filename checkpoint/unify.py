"""Gives the tensors of every family the names, the shapes and the meaning that Llama's have.

`model.py` knows one form of a block. What can be brought into it while reading is done here:

fused     Phi-3 stores q, k, v as one matrix, and gate, up as another: each part is its rows.
factors   Granite multiplies embeddings by e, what a block adds by r, and divides the logits by s.
          RMSNorm ignores the scale of its input (with an eps / e**2, see config.py). So the
          hidden states stay as small as the embeddings are: o and down times r / e, and the final
          norm over s, say the same. The embedding, which may be the LM head too, stays as it is.
partial   Phi-4-mini rotates only the first channels of a head. The rows of q and k are put in
          another order, the same for both, in which channel j pairs with j + head_dim / 2 as
          elsewhere; the pairs that do not rotate have a rotation of 0 (rope.py).
text      Checkpoints of Ministral 3 and Qwen3-VL hold a part for images, which is not read.
"""

import math

from checkpoint.values import number
from model import SITES

RENAMED = {"language_model.": "", "shared_mlp.input_linear": "mlp.gate_up_proj",
           "shared_mlp.output_linear": "mlp.down_proj"}
IMAGES = ("vision_tower.", "model.vision_tower.",
          "multi_modal_projector.", "model.multi_modal_projector.", "model.visual.", "visual.")
FUSED = {"qkv_proj": "qkv", "gate_up_proj": "gate_up"}  # the projections of a site in one matrix


def unify(config_json, config, stored, read):
    """What a checkpoint holds -> the same as Llama would hold it: ({name: shape}, read, {name: its
    name in the files}).

    config_json, config: the same in a config.json's words and in those of `Config`
    stored: {name: shape} in the files
    read:   a function of such a name and slices that returns a tensor; so is the returned one
    Raises ValueError, naming the tensor.
    """
    shapes, places = stored_names(config, stored)
    factors, order = granite_factors(config_json), head_order(config)

    def read_unified(name, part=...):
        stored_name, row = places[name]
        if shapes[name] != stored[stored_name]:  # a part of a fused matrix
            rows, *columns = (slice(None),) if part is ... else part
            start, end, _ = rows.indices(shapes[name][0])
            part = slice(row + start, row + end), *columns
        tensor = read(stored_name, part)
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module in factors:
            tensor = tensor.float() * factors[module]
        if order is not None and module in ("q_proj", "k_proj"):
            tensor = tensor.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1)
        return tensor

    return shapes, read_unified, {name: stored_name for name, (stored_name, _) in places.items()}


def stored_names(config, stored):
    """({name: shape} as in Llama, {name: (its name in the files, its first row there)}).

    Arguments and errors as for `unify`.
    """
    shapes, places = {}, {}
    for name, shape in stored.items():
        if name.startswith(IMAGES):
            continue
        plain = name
        for old, new in RENAMED.items():
            plain = plain.replace(old, new)
        module, _, kind = plain.rpartition(".")
        parent, _, last = module.rpartition(".")
        parts, row = {plain: shape[:1]}, 0
        if last in FUSED:
            site = FUSED[last]
            widths = config.linear_shape(site)[1]
            if shape[:1] != (sum(widths),):
                raise ValueError(f"tensor {name} has shape {list(shape)[:8]}; the config asks for "
                                 f"{sum(widths)} rows")
            parts = {f"{parent}.{part}_proj.{kind}": (width,)
                     for part, width in zip(SITES[site], widths)}
        for part, rows in parts.items():
            if part in shapes:
                raise ValueError(f"tensor {part} is there twice, once as {name}")
            shapes[part], places[part] = rows + shape[1:], (name, row)
            row += sum(rows)
    return shapes, places


def granite_factors(config_json):
    """{module: what its weights are multiplied by}; {} if the family has no such factors."""
    if not str(config_json.get("model_type")).startswith("granite"):
        return {}
    embedding, residual, logits = (
        number(config_json, key, 1.0, 1e-6, 1e6, float)
        for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling"))
    return {"o_proj": residual / embedding, "down_proj": residual / embedding,
            "norm": 1 / logits}


def head_order(config):
    """The order of a head's channels in which j pairs with j + head_dim / 2; None if all turn."""
    head_dim = config.head_dim
    turned = head_dim - 2 * config.rope_divisors.count(math.inf)
    if turned == head_dim:
        return None
    half, middle = turned // 2, (turned + head_dim) // 2
    return [*range(half), *range(turned, middle), *range(half, turned), *range(middle, head_dim)]
