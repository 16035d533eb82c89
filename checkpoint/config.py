"""Reads config.json, the settings of a Hugging Face model, into `model.Config`.

A wrong number here would mean wrong text without an error. So every value is checked, and what
the forward pass does not compute is refused.
"""

from checkpoint.rope import parse_rope
from checkpoint.values import flag, number
from model import Config

FAMILIES = {  # model_type in config.json -> the architecture there
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
WINDOWED = ("mistral", "ministral3", "olmo3", "phi3")  # those that heed sliding_window
DEFAULTS = {  # what a family's config.json means where it leaves a key out, unlike the others'
    "mistral": {"sliding_window": 4096},
    "smollm3": {"rope_theta": 2e6, "tie_word_embeddings": True},
    "ministral3": {"rms_norm_eps": 1e-5, "head_dim": 128},
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
    "phi3": {"rms_norm_eps": 1e-5},
    "qwen3": {"head_dim": 128},
}
FIXED = {"hidden_act": "silu", "mlp_bias": False}


def parse_config(config, context=None):
    """The dictionary of a config.json -> Config.

    context: longest text, in tokens; None for what the model was made for (see rope.py)
    Raises ValueError, naming the key and its value.
    """
    model_type = check_family(config)
    config = DEFAULTS.get(model_type, {}) | config
    for key, wanted in FIXED.items():
        if config.get(key, wanted) not in (wanted, None):
            raise ValueError(
                f"config value {key} is {config[key]!r}; only {wanted!r} is supported")
    if config.get("use_sliding_window"):
        raise ValueError("config value use_sliding_window is true; a window on some of the "
                         "layers is not supported")
    window = None
    if model_type in WINDOWED and config.get("sliding_window") is not None:
        window = number(config, "sliding_window", high=1 << 24)

    hidden_size = number(config, "hidden_size")
    n_heads = number(config, "num_attention_heads", high=1024)
    n_kv_heads = number(config, "num_key_value_heads", n_heads, high=1024)
    head_dim = number(config, "head_dim", hidden_size // n_heads, high=1024)
    if n_heads % n_kv_heads:
        raise ValueError(f"config value num_key_value_heads is {n_kv_heads}, which does not "
                         f"divide num_attention_heads {n_heads}")
    if head_dim % 2:
        raise ValueError(f"config value head_dim is {head_dim}; rotary embedding needs an even "
                         "number")
    n_layers = number(config, "num_hidden_layers", high=1024)
    mlp = "intermediate_size"
    if model_type == "granitemoehybrid":
        check_dense(config)
        mlp = "shared_intermediate_size"
    rope = parse_rope(config, head_dim, context)
    norm_eps = number(config, "rms_norm_eps", 1e-6, 0.0, 1.0, float)
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
        full_layers=parse_full_layers(config, n_layers) if model_type == "olmo3" else (),
        no_rope_layers=parse_no_rope(config, n_layers) if model_type == "smollm3" else (),
        qk_norm={"qwen3": "head", "olmo2": "all", "olmo3": "all"}.get(model_type),
        norms_behind=model_type in ("olmo2", "olmo3"),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias and model_type not in ("mistral", "ministral3", "qwen2"),
        tie_embeddings=flag(config, "tie_word_embeddings"),
    )


def check_family(config):
    """The model_type, if it is supported and the architecture belongs to it."""
    model_type = str(config.get("model_type"))
    architectures = config.get("architectures") or [FAMILIES.get(model_type)]
    if (model_type not in FAMILIES or not isinstance(architectures, list)
            or FAMILIES[model_type] not in architectures):
        raise ValueError(
            f"unsupported architecture: model_type {model_type!r}, architectures "
            f"{architectures!r}; supported are {', '.join(FAMILIES.values())}; "
            "examples/transformers_model.py makes any transformers model sparse (README.md)")
    return model_type


def text_part(config):
    """The part of a config.json about text, where there is one about images, too."""
    if config.get("model_type") != "mistral3" or not isinstance(config.get("text_config"), dict):
        return config
    return {"tie_word_embeddings": config.get("tie_word_embeddings")} | config["text_config"]


def check_dense(config):
    """Raise ValueError for the Granite 4 models that have other layers than Llama's."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    attention = isinstance(kinds, list) and {*map(str, kinds)} <= {"attention", "full_attention"}
    if (config.get("num_local_experts") != 0 or not attention
            or config.get("position_embedding_type") != "rope"):
        raise ValueError("this Granite has experts, Mamba layers or no RoPE (config values "
                         "num_local_experts, layer_types, position_embedding_type); only dense "
                         "ones with RoPE are supported")


def parse_full_layers(config, n_layers):
    """The layers without a window: those that OLMo 3's layer_types says; else every fourth."""
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [("sliding", "full")[(i + 1) % 4 == 0] + "_attention" for i in range(n_layers)]
    if (not isinstance(kinds, list) or len(kinds) != n_layers
            or any(kind not in ("sliding_attention", "full_attention") for kind in kinds)):
        raise ValueError(f"config value layer_types is {str(kinds)[:100]}; expected "
                         "sliding_attention or full_attention for each of the "
                         f"{n_layers} layers")
    return tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")


def parse_no_rope(config, n_layers):
    """The layers without RoPE: those with a 0 in SmolLM3's no_rope_layers; else every fourth."""
    flags = config.get("no_rope_layers")
    if flags is None:
        step = number(config, "no_rope_layer_interval", 4)
        flags = [int((i + 1) % step != 0) for i in range(n_layers)]
    if (not isinstance(flags, list) or len(flags) != n_layers
            or any(value not in (0, 1) for value in flags)):
        raise ValueError(f"config value no_rope_layers is {str(flags)[:100]}; expected 0 or 1 for "
                         f"each of the {n_layers} layers")
    return tuple(i for i, value in enumerate(flags) if not value)
