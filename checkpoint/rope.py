"""RoPE for texts longer than those of the training, as numbers for `model.Config`.

RoPE turns channel pair j of a head by theta ** (-2 j / head_dim) radians per position. Every way
to serve longer texts divides these rotations, each pair's by a number of its own:

linear    all by the same factor
llama3    by the factor those that turn less than low_freq_factor times within the original
          context; not those that turn more than high_freq_factor times; a blend in between
yarn      the same idea with beta_slow and beta_fast, the blend over the pairs' numbers; scores
          grow a little, too (Peng et al., arXiv:2309.00071)
"""

import math

import torch

from checkpoint.values import flag, number

NEEDED = {  # rope_type -> the numbers that it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def parse_rope(config, head_dim):
    """What the dictionary of a config.json says of RoPE -> the fields of `Config` about it, a dict.

    New configs keep all of RoPE in rope_parameters, old ones in rope_theta and rope_scaling.
    Raises ValueError, naming the key and its value.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(v, (dict, list)) for v in rope.values()):
        raise ValueError(f"config value rope_scaling is {rope!r}; expected one flat object for "
                         "all layers")
    theta = number(config if rope.get("rope_theta") is None else rope, "rope_theta", 10000.0,
                   1.0, 1e12, float)
    rope_type = str(rope.get("rope_type", rope.get("type", "default")))
    if rope_type not in NEEDED:
        raise ValueError(f"rope scaling type {rope_type!r} is not supported; supported are "
                         f"{', '.join(NEEDED)}")
    if rope_type == "yarn":
        rope = {"original_max_position_embeddings": config.get("max_position_embeddings")} | rope
    settings = {key: number(rope, key, None, 1e-3, 1e8, float) for key in NEEDED[rope_type]}
    fields = {"rope_theta": theta}
    if rope_type == "yarn":
        settings["beta_fast"] = number(rope, "beta_fast", 32.0, 1e-3, 1e8, float)
        settings["beta_slow"] = number(rope, "beta_slow", 1.0, 1e-3, 1e8, float)
        settings["truncate"] = flag(rope, "truncate", True)
        fields["rope_factor"] = yarn_factor(rope, settings["factor"])
    if rope_type == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise ValueError(f"config value low_freq_factor is {settings['low_freq_factor']}; it must "
                         f"be below high_freq_factor {settings['high_freq_factor']}")
    if rope_type != "default":
        fields["rope_divisors"] = tuple(divisors(rope_type, settings, theta, head_dim).tolist())
    return fields


def divisors(rope_type, settings, theta, head_dim):
    """The divisors of RoPE's rotations, float64 [head_dim / 2]."""
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    if rope_type == "linear":
        keep = torch.zeros_like(pair)  # the share of each rotation that is not slowed down
    elif rope_type == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        turns = settings["original_max_position_embeddings"] / (2 * math.pi)
        turns = turns * theta ** (-2 * pair / head_dim)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif rope_type == "yarn":
        def pair_of(turns):
            """The pair, as a fraction, that turns so often within the original context."""
            longest = settings["original_max_position_embeddings"] / (turns * 2 * math.pi)
            return head_dim * math.log(longest) / (2 * math.log(theta))

        first, last = pair_of(settings["beta_fast"]), pair_of(settings["beta_slow"])
        if settings["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        keep = 1 - ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
    return 1 / (keep + (1 - keep) / settings["factor"])


def yarn_factor(rope, factor):
    """YaRN's factor of cos and sin: as given, or by the paper's formula."""
    def formula(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    above, below = (number(rope, key, 0.0, 0.0, 1e3, float) for key in ("mscale", "mscale_all_dim"))
    default = formula(above) / formula(below) if above and below else formula(1.0)
    return number(rope, "attention_factor", default, 1e-3, 1e3, float)
