"""Reads config.json, the settings of a Hugging Face model, into `model.Config`.

A wrong number here would mean wrong text without an error. So every value is checked, and what
the forward pass does not compute is refused.
"""

from checkpoint.rope import parse_rope
from checkpoint.values import choices, flag, number
from model import Config

FAMILIES = (  # model_type in config.json
    "llama", "mistral", "ministral", "qwen2", "qwen3", "qwen3_vl_text", "smollm3", "ministral3",
    "olmo2", "olmo3", "granite", "granitemoehybrid", "phi3")
DEFAULTS = {  # what a config.json means where it leaves a key out
    "": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048},
    **dict.fromkeys(("mistral", "ministral"), {
        "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}),
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "qwen3_vl_text": {"num_key_value_heads": 32, "max_position_embeddings": 128000,
                      "head_dim": 128, "rope_theta": 5e5},
    "smollm3": {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
                "tie_word_embeddings": True},
    "ministral3": {"num_key_value_heads": 8, "max_position_embeddings": 262144, "head_dim": 128,
                   "rms_norm_eps": 1e-5, "rope_theta": None},  # None: must be there
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
}
FIXED = {"hidden_act": ("silu", "swish"), "per_layer_config": (),
         **dict.fromkeys(("mlp_bias", "is_encoder_decoder"), (False,)),
         # of other programs than transformers, which ignores them
         **dict.fromkeys(("rope_interleaved", "use_mrope", "lm_head_bias"), (False,)),
         **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,)),
         **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), ())}
# The families that heed sliding_window, those that do so only with use_sliding_window, and those
# whose layer_types say in which layers (a Mistral that has them is what transformers calls
# Ministral).
WINDOWED = ("mistral", "ministral", "ministral3", "phi3", "olmo3", "qwen2", "qwen3",
            "smollm3")
SWITCHED = ("qwen2", "qwen3", "smollm3")
LAYERED = ("mistral", "ministral", "olmo3", "qwen2", "qwen3", "smollm3")


def parse_config(config, context=None):
    """The dictionary of a config.json -> Config.

    context: longest text, in tokens; None for what the model was made for (see rope.py)
    Raises ValueError, naming the key and its value.
    """
    model_type = check_family(config)
    config = DEFAULTS[""] | DEFAULTS.get(model_type, {}) | config
    for key, allowed in FIXED.items():
        if config.get(key) not in (*allowed, None):
            raise ValueError(f"config value {key} is {repr(config[key])[:100]}; only "
                             f"{(*allowed, None)[0]!r} is supported")
    hidden_size = number(config, "hidden_size")
    n_heads = number(config, "num_attention_heads", high=1024)
    n_kv_heads = number(config, "num_key_value_heads", n_heads, high=1024)
    head_dim = number(config, "head_dim", hidden_size // n_heads, high=1024)
    check_heads(n_heads, n_kv_heads, head_dim)
    n_layers = number(config, "num_hidden_layers", high=1024)
    mlp = "intermediate_size"
    if model_type == "granitemoehybrid":
        check_dense(config, n_layers)
        mlp = "shared_intermediate_size"
    no_rope = parse_no_rope(config, n_layers) if model_type == "smollm3" else ()
    window, full = parse_window(config, model_type, n_layers, no_rope)
    rope = parse_rope(config, head_dim, context)
    norm_eps = number(config, "rms_norm_eps", None, 0.0, 1.0, float)
    if model_type.startswith("granite"):  # the rest of its factors is in the weights: unify.py
        norm_eps /= number(config, "embedding_multiplier", 1.0, 1e-6, 1e6, float) ** 2
        scale = number(config, "attention_multiplier", 1.0, 1e-6, 1e6, float)  # of the scores
        rope["rope_factor"] = rope.get("rope_factor", 1.0) * (scale * head_dim ** 0.5) ** 0.5
    attention_bias = flag(config, "attention_bias")
    return Config(
        vocab_size=number(config, "vocab_size", high=1 << 22),
        hidden_size=hidden_size,
        intermediate_size=number(config, mlp),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        norm_eps=norm_eps,
        **rope,
        sliding_window=window,
        full_layers=full,
        plain_rope_layers=tuple(i for i in range(n_layers) if i not in full)
        if model_type == "olmo3" else (),
        no_rope_layers=no_rope,
        qk_norm={"qwen3": "head", "qwen3_vl_text": "head", "olmo2": "all",
                 "olmo3": "all"}.get(model_type),
        norms_after=model_type in ("olmo2", "olmo3"),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias and model_type not in (
            "mistral", "ministral", "ministral3", "qwen2"),
        tie_embeddings=flag(config, "tie_word_embeddings"),
    )


def check_heads(n_heads, n_kv_heads, head_dim):
    """Raise ValueError for numbers that do not belong together."""
    if n_heads % n_kv_heads:
        raise ValueError(f"config value num_key_value_heads is {n_kv_heads}, which does not "
                         f"divide num_attention_heads {n_heads}")
    if head_dim % 2:
        raise ValueError(f"config value head_dim is {head_dim}; rotary embedding needs an even "
                         "number")


def check_family(config):
    """The model_type, if it is supported and the architecture belongs to it."""
    model_type = str(config.get("model_type"))
    name = f"{model_type.replace('_', '')}forcausallm"
    architectures = config.get("architectures") or [name]
    if (model_type not in FAMILIES or not isinstance(architectures, list)
            or name not in [str(architecture).lower() for architecture in architectures]):
        raise ValueError(
            f"unsupported architecture: model_type {model_type!r}, architectures "
            f"{architectures!r}; supported are {', '.join(FAMILIES)}; "
            "examples/transformers_model.py makes any transformers model sparse (README.md)")
    return model_type


def text_part(config):
    """The part of a config.json about text, where there is one about images, too."""
    tied = {"mistral3": True, "qwen3_vl": False}.get(str(config.get("model_type")))
    text, key = config.get("text_config"), "tie_word_embeddings"
    if tied is None or not isinstance(text, dict):
        return config
    whole = (key, "quantization_config", "compression_config", "eos_token_id")  # count outside
    return {key: tied} | text | {name: config[name] for name in whole if name in config}


def check_dense(config, n_layers):
    """Raise ValueError for the Granite 4 models that have other layers than Llama's."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    attention = (isinstance(kinds, list) and len(kinds) == n_layers
                 and {*map(str, kinds)} <= {"attention", "full_attention"})
    if (config.get("num_local_experts") != 0 or not attention
            or config.get("position_embedding_type") != "rope"):
        raise ValueError("this Granite has experts, Mamba layers or no RoPE (config values "
                         "num_local_experts, layer_types, position_embedding_type); only dense "
                         "ones with RoPE are supported")


def parse_window(config, model_type, n_layers, no_rope_layers):
    """(the sliding window or None, the layers that see all tokens though others have it)."""
    window = config.get("sliding_window") if model_type in WINDOWED else None
    if model_type in SWITCHED and not flag(config, "use_sliding_window"):
        window = None
    if window is not None:
        window = number(config, "sliding_window", high=1 << 24)
    windowed = range(n_layers if window else 0)
    if model_type == "olmo3":
        windowed = [i for i in windowed if (i + 1) % 4 != 0]
    elif model_type == "smollm3":
        windowed = [i for i in windowed if i in no_rope_layers]
    elif model_type in SWITCHED and window:
        windowed = windowed[number(config, "max_window_layers", 28, low=0):]
    kinds = config.get("layer_types")
    if kinds is not None and model_type != "granitemoehybrid":
        kinds = choices(config, "layer_types", n_layers, ("sliding_attention", "full_attention"))
        named = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
        if named != [*windowed] and (model_type not in LAYERED or not window):
            raise ValueError(f"config value layer_types gives {len(named)} layers a window, but "
                             f"by sliding_window {len(windowed)} of this model have one")
        windowed = named
    full = tuple(i for i in range(n_layers) if i not in windowed)
    return (window, full) if len(full) < n_layers else (None, ())


def parse_no_rope(config, n_layers):
    """The layers without RoPE: those with a 0 in SmolLM3's no_rope_layers; else every fourth."""
    if config.get("no_rope_layers") is None:
        step = number(config, "no_rope_layer_interval", 4)
        return tuple(range(step - 1, n_layers, step))
    flags = choices(config, "no_rope_layers", n_layers, (0, 1))
    return tuple(i for i, value in enumerate(flags) if not value)
