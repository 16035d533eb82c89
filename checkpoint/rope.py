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

from checkpoint.values import flag, number, numbers

NEEDED = {  # rope_type -> the numbers that it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}


def parse_rope(config, head_dim, context=None):
    """What the dictionary of a config.json says of RoPE -> the fields of `Config` about it, a dict.

    context: longest text, in tokens; without it that of max_position_embeddings, but longrope's
        original context, within which it needs no stretching
    Raises ValueError, naming the key and its value.
    """
    rope, rope_type = rope_settings(config)
    theta = number(config if rope.get("rope_theta") is None else rope, "rope_theta", None, 1.1,
                   1e12, float)
    longest = number(config, "max_position_embeddings", high=1 << 24)
    original = "original_max_position_embeddings"
    if rope_type in ("llama3", "yarn", "longrope"):
        within = config.get(original)  # counts more than the same key of RoPE's settings
        if within is None and config.get("model_type") != "phi3":
            within = rope.get(original, None if rope_type == "longrope" else longest)
        rope = rope | {original: within}
    settings = {key: number(rope, key, None, 2.0 if key == original else 1e-3, 1e8, float)
                for key in NEEDED[rope_type]}
    # A factor is there for longer texts, even if max_position_embeddings was left as it had been.
    reach = longest
    if rope_type in ("yarn", "longrope"):
        stretch = number(rope, "factor", longest / settings[original], 1e-3, 1e8, float)
        reach = longest = max(longest, min(int(stretch * settings[original]), 1 << 24))
    elif rope_type == "linear":
        reach = max(longest, min(int(longest * settings["factor"]), 1 << 24))
    if context is not None and not 1 <= context <= reach:
        raise ValueError(f"context {context} is outside 1 to {reach}, the longest of this model")
    turned = turned_channels(config, head_dim)
    fields = {"rope_theta": theta, "context": context or longest}
    if rope_type == "longrope":
        within = settings[original]
        fields["context"] = context or min(longest, int(within))
        name = "long_factor" if fields["context"] > within else "short_factor"
        settings["divisors"] = numbers(rope, name, turned // 2)
        default = math.sqrt(1 + math.log(stretch) / math.log(within)) if stretch > 1 else 1.0
        fields["rope_factor"] = number(rope, "attention_factor", default, 1e-3, 1e3, float)
    if rope_type == "yarn":
        settings["beta_fast"] = number(rope, "beta_fast", 32.0, 1e-3, 1e8, float)
        settings["beta_slow"] = number(rope, "beta_slow", 1.0, 1e-3, 1e8, float)
        settings["truncate"] = flag(rope, "truncate", True)
        fields["rope_factor"] = yarn_factor(rope, settings["factor"])
    if config.get("model_type") == "ministral3" and rope.get("llama_4_scaling_beta") is not None:
        fields["query_growth"] = (
            number(rope, "llama_4_scaling_beta", None, 0.0, 10.0, float),
            number(rope, "original_max_position_embeddings", None, 2.0, 1e8, float))
    if rope_type == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise ValueError(f"config value low_freq_factor is {settings['low_freq_factor']}; it must "
                         f"be below high_freq_factor {settings['high_freq_factor']}")
    if rope_type != "default" or turned < head_dim:
        still = [math.inf] * ((head_dim - turned) // 2)
        # `Config` has the exponents of a head that turns as a whole.
        exponents = torch.arange(turned // 2) * 2 * (1 / turned - 1 / head_dim)
        found = divisors(rope_type, settings, theta, turned) * theta ** exponents
        fields["rope_divisors"] = (*found.tolist(), *still)
    return fields


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
    if old and new and new | old != new:
        raise ValueError(f"config value rope_scaling is {old!r}, but rope_parameters is {new!r}; "
                         "write into the latter what counts, and remove the former")
    rope = new or old
    names = [str(rope[key]) for key in ("rope_type", "type") if rope.get(key) is not None]
    if config.get("model_type") == "phi3":  # its names in old configs of this family
        names = ["longrope" if name in ("su", "yarn") else name for name in names]
    rope_type = names[0] if names else "default"
    if len({*names}) > 1:
        raise ValueError(f"RoPE's settings have rope_type {rope_type!r} and type {names[-1]!r}; "
                         "remove one of the two")
    if rope_type not in NEEDED:
        raise ValueError(f"rope scaling type {rope_type!r} is not supported; supported are "
                         f"{', '.join(NEEDED)}")
    return rope, rope_type


def turned_channels(config, head_dim):
    """How many channels of a head turn: all, but in Phi-4-mini the first three quarters."""
    rope, key = rope_settings(config)[0], "partial_rotary_factor"
    share = number(config if rope.get(key) is None else rope, key, 1.0, 0.0, 1.0, float)
    turned = int(head_dim * share)
    if turned < head_dim and config.get("model_type") != "phi3":
        raise ValueError(f"config value {key} is {share}; only 1.0 is supported")
    if turned % 2 or turned == 0:
        raise ValueError(f"{turned} of a head's {head_dim} channels turn (config value {key}, "
                         f"{share}); RoPE needs an even number")
    return turned


def divisors(rope_type, settings, theta, head_dim):
    """The divisors of the rotations of `head_dim` channels, float64 [head_dim / 2]."""
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    if rope_type == "default":
        return torch.ones_like(pair)
    if rope_type == "longrope":
        return torch.tensor(settings["divisors"], dtype=torch.float64)
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
