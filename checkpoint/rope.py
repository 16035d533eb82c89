"""RoPE for texts longer than those of the training, as numbers for `model.Config`.

RoPE rotates channel pair j of a head by theta ** (-2 j / head_dim) radians per position. Every way
to serve longer texts divides these rotations, each pair's by a number of its own:

linear    all by the same factor
llama3    by the factor those that rotate less than low_freq_factor times within the original
          context; not those that rotate more than high_freq_factor times; a blend in between
yarn      the same idea with beta_slow and beta_fast, the blend over the pairs' numbers; scores
          grow a little, too (Peng et al., arXiv:2309.00071)
longrope  by one list of divisors within the original context, by another one beyond it; scores
          grow in both (Ding et al., arXiv:2402.13753)

Phi-4-mini rotates only a part of each head. The other pairs are divided by infinity.
"""

import math

import torch

from checkpoint.values import choices, flag, number

TYPES = ("default", "linear", "llama3", "yarn", "longrope")
MOST = 1 << 24  # tokens of a context


def parse_rope(config, head_dim, context=None):
    """What the dictionary of a config.json says of RoPE -> the fields of `Config` about it, a dict.

    context: longest text, in tokens; without it that of max_position_embeddings, but longrope's
        original context, within which it needs no stretching
    Raises ValueError, naming the key and its value.
    """
    rope, rope_type = rope_settings(config)

    def value(key, default=None, low=1e-3):
        return number(rope, key, default, low, 1e8, float)

    theta = number(config if rope.get("rope_theta") is None else rope, "rope_theta", None, 1.1,
                   1e12, float)
    longest = reach = number(config, "max_position_embeddings", high=MOST)
    turned, original, factor = turned_channels(rope, config, head_dim), None, 1.0
    if rope_type in ("llama3", "yarn", "longrope"):
        key = "original_max_position_embeddings"
        original = config.get(key)  # counts more than the same key of RoPE's settings
        if original is None and config.get("model_type") != "phi3":
            original = rope.get(key, None if rope_type == "longrope" else longest)
        rope = rope | {key: original}
        original = value(key, low=2.0)
    if rope_type != "default":
        factor = value("factor", longest / original if rope_type == "longrope" else None)
    # It is there for longer texts, even if max_position_embeddings was left as it had been.
    if rope_type in ("yarn", "longrope"):
        reach = longest = max(longest, min(int(factor * original), MOST))
    elif rope_type == "linear":
        reach = max(longest, min(int(longest * factor), MOST))
    if context is not None and not 1 <= context <= reach:
        raise ValueError(f"context {context} is outside 1 to {reach}, the longest of this model")
    fields = {"rope_theta": theta, "context": context or longest}
    if rope_type == "longrope":
        fields["context"] = context or min(longest, int(original))
        name = "long_factor" if fields["context"] > original else "short_factor"
        divisors = [number({name: divisor}, name, None, 1e-6, 1e8, float)
                    for divisor in choices(rope, name, turned // 2)]
        divisors = torch.tensor(divisors, dtype=torch.float64)
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        fields["rope_factor"] = value("attention_factor", default)
    else:
        keep = kept_share(rope_type, rope, value, original, theta, turned)
        divisors = 1 / (keep + (1 - keep) / factor)
    if rope_type == "yarn":
        fields["rope_factor"] = value("attention_factor", yarn_factor(rope, factor))
    if config.get("model_type") == "ministral3" and rope.get("llama_4_scaling_beta") is not None:
        fields["query_growth"] = (value("llama_4_scaling_beta", None, 0.0),
                                  value("original_max_position_embeddings", None, 2.0))
    if rope_type != "default" or turned < head_dim:
        still = [math.inf] * ((head_dim - turned) // 2)
        # `Config` has the exponents of a head that turns as a whole.
        exponents = torch.arange(turned // 2) * 2 * (1 / turned - 1 / head_dim)
        fields["rope_divisors"] = (*(divisors * theta ** exponents).tolist(), *still)
    return fields


def kept_share(rope_type, rope, value, original, theta, turned):
    """The share of each pair's rotation that is not slowed down, float64 [turned / 2]."""
    pair = torch.arange(turned // 2, dtype=torch.float64)
    if rope_type == "llama3":
        low, high = value("low_freq_factor"), value("high_freq_factor")
        if low >= high:
            raise ValueError(f"config value low_freq_factor is {low}; it must be below "
                             f"high_freq_factor {high}")
        turns = original / (2 * math.pi) * theta ** (-2 * pair / turned)
        return ((turns - low) / (high - low)).clamp(0, 1)
    if rope_type == "yarn":
        # the pairs, as fractions, that turn so often within the original context
        first, last = (turned * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                       for turns in (value("beta_fast", 32.0), value("beta_slow", 1.0)))
        if flag(rope, "truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, turned - 1)
        return 1 - ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
    return torch.full_like(pair, rope_type == "default")


def rope_settings(config):
    """(RoPE's settings in the dictionary of a config.json, rope_type).

    New configs keep all of RoPE in rope_parameters, old ones in rope_theta and rope_scaling.
    """
    new, old = (config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if config.get("model_type") == "olmo3" and isinstance(new, dict) and new:
        # Layers with a window have the plain RoPE: `Config.plain_rope_layers`.
        windowed, new = (new[key] if isinstance(new.get(key), dict) else {}
                         for key in ("sliding_attention", "full_attention"))
        plain = {"rope_type": "default", "rope_theta": new.get("rope_theta")}
        if {"rope_type": "default"} | windowed != plain:
            raise ValueError(f"config value rope_parameters is {config['rope_parameters']!r}; "
                             "expected one object for full_attention and one for "
                             "sliding_attention, the latter plain RoPE of the same rope_theta")
    if (not isinstance(new, dict) or not isinstance(old, dict)
            or any(isinstance(value, dict) for value in (*new.values(), *old.values()))):
        raise ValueError(f"config value rope_scaling is {old or new!r}; expected one flat object "
                         "for all layers")
    plain = {"rope_type": "default", "rope_theta": old.get("rope_theta", config.get("rope_theta"))}
    rope = old if plain | new == plain else new
    if rope | old != rope:
        raise ValueError(f"config value rope_scaling is {old!r}, but rope_parameters is {new!r}; "
                         "write into the latter what counts, and remove the former")
    names = [str(rope[key]) for key in ("rope_type", "type") if rope.get(key) is not None]
    if config.get("model_type") == "phi3":  # its names in old configs of this family
        names = ["longrope" if name in ("su", "yarn") else name for name in names]
    rope_type = names[0] if names else "default"
    if len({*names}) > 1:
        raise ValueError(f"RoPE's settings have rope_type {rope_type!r} and type {names[-1]!r}; "
                         "remove one of the two")
    if rope_type not in TYPES:
        raise ValueError(f"rope scaling type {rope_type!r} is not supported; supported are "
                         f"{', '.join(TYPES)}")
    return rope, rope_type


def turned_channels(rope, config, head_dim):
    """How many channels of a head turn: all, but in Phi-4-mini the first three quarters."""
    key = "partial_rotary_factor"
    share = number(config if rope.get(key) is None else rope, key, 1.0, 0.0, 1.0, float)
    turned = int(head_dim * share)
    if turned < head_dim and config.get("model_type") != "phi3":
        raise ValueError(f"config value {key} is {share}; only 1.0 is supported")
    if turned % 2 or turned == 0:
        raise ValueError(f"{turned} of a head's {head_dim} channels turn (config value {key}, "
                         f"{share}); RoPE needs an even number")
    return turned


def yarn_factor(rope, factor):
    """YaRN's factor of cos and sin, by the paper's formula."""
    def formula(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    above, below = (number(rope, key, 0.0, 0.0, 1e3, float) for key in ("mscale", "mscale_all_dim"))
    return formula(above) / formula(below) if above and below else formula(1.0)
