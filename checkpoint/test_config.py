"""config.json -> Config, in both spellings; what it and `put` refuse."""

import pytest
import torch
import transformers

from checkpoint.config import FAMILIES, parse_config
from checkpoint.tensors import put
from model import Model
from test_model import CASES, ROPE, SMALL

LLAMA = SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("name", ["llama-3", "linear rope", "mistral", "qwen2", "llama-2"])
def test_old_and_new_spelling(name):
    stem, changes, rope = CASES[name]
    new = getattr(transformers, f"{stem}Config")(**SMALL | changes,
                                                 rope_parameters=ROPE[rope]).to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old["rope_theta"] = ROPE[rope]["rope_theta"]
    old["rope_scaling"] = {key: value for key, value in ROPE[rope].items() if key != "rope_theta"}
    oldest = old | {"rope_scaling": {"type": rope}
                    | {k: v for k, v in old["rope_scaling"].items() if k != "rope_type"}}
    if rope == "default":
        oldest["rope_scaling"] = None
    assert parse_config(new) == parse_config(old) == parse_config(oldest)


def test_what_llamas_config_leaves_out_is_as_in_transformers():
    given = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads")
    short = {key: SMALL[key] for key in given}
    full = transformers.LlamaConfig(**short).to_dict()
    assert parse_config(short | {"model_type": "llama"}) == parse_config(full)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_family_leaves_out_is_as_in_transformers(model_type):
    given = SMALL | {"num_local_experts": 0, "layer_types": ["full_attention"] * 3}
    if model_type == "granitemoehybrid":
        given |= {"position_embedding_type": "rope", "shared_intermediate_size": 48,
                  "mamba_n_heads": 4}
    elif model_type == "olmo3":
        given["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    elif model_type == "ministral3":  # YaRN, whose numbers no config leaves out
        given["rope_parameters"] = ROPE["ministral"]
    full = transformers.AutoConfig.for_model(model_type, **given).to_dict()
    short = {key: full[key] for key in full if key in given}
    short |= {"model_type": model_type, "max_position_embeddings": full["max_position_embeddings"]}
    assert parse_config(short) == parse_config(full)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt2"}, "'gpt2'.*supported are LlamaForCausalLM.*transformers_model.py"),
    ({"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]},
     "no_rope_layers is"),
    ({"model_type": "qwen2"}, "LlamaForCausalLM.*supported are"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"model_type": None}, "unsupported architecture"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": "many"}, "hidden_size is 'many'"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
     "'dynamic'.*default, linear, llama3, yarn"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}}, "truncate is 'no'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0}},
     "attention_factor is -1.0"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ({"rope_parameters": ROPE["llama3"] | {"low_freq_factor": 9.0}}, "low_freq_factor is 9.0"),
])
def test_config_errors(change, words):
    parse_config(LLAMA)
    with pytest.raises(ValueError, match=words) as error:
        parse_config(LLAMA | change)
    assert "\n" not in str(error.value)


def test_ropes_settings_are_read_from_rope_alone():
    """A key of rope_scaling is no setting of the model, and one of the model none of RoPE."""
    plain = parse_config(LLAMA)
    assert parse_config(LLAMA | {"rope_scaling": {
        "rope_type": "default", "hidden_size": 64, "num_hidden_layers": 9}}) == plain
    with pytest.raises(ValueError, match="factor is None"):
        parse_config(LLAMA | {"factor": 4.0, "rope_scaling": {"rope_type": "linear"}})


def test_put_errors():
    model = Model(parse_config(LLAMA))
    with pytest.raises(ValueError, match="q_proj.*shape"):
        put(model, "model.layers.0.self_attn.q_proj.weight", torch.zeros(32, 31))
    with pytest.raises(ValueError, match="layers.3.*shape"):
        put(model, "model.layers.3.self_attn.q_proj.weight", torch.zeros(32, 32))
