"""config.json -> Config, in both spellings; what it and `put` refuse."""

import copy
import math

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from checkpoint.config import FAMILIES, parse_config, text_part
from checkpoint.conftest import CASES, LLAMA, ROPE, SMALL
from checkpoint.known_models import KNOWN_MODELS
from checkpoint.rope import yarn_factor
from checkpoint.tensors import put, tensor_shapes
from checkpoint.unify import granite_factors
from model import Model


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


FAMILY = {  # what a family needs beside SMALL, or what makes all of its keys count
    "granitemoehybrid": {"position_embedding_type": "rope", "shared_intermediate_size": 48,
                         "mamba_n_heads": 4, "num_local_experts": 0,
                         "layer_types": ["full_attention"] * 3},
    "ministral3": {"sliding_window": 16, "rope_parameters": ROPE["ministral"]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    **dict.fromkeys(("qwen2", "qwen3"), {
        "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "smollm3": {"use_sliding_window": True, "sliding_window": 16, "no_rope_layer_interval": 2},
    "phi3": {"sliding_window": 16, "rope_parameters": ROPE["longrope"],
             "original_max_position_embeddings": 32}}
HARMLESS = {  # keys without which the logits of one text are the same
    "_name_or_path", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "embd_pdrop", "id2label", "initializer_range", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "return_dict", "transformers_version", "use_cache"}
HARMLESS |= {"eos_token_id"}  # it ends a text: folder_tokenizer.py
EXPERTS = {"intermediate_size", "num_experts_per_tok", "output_router_logits",
           "router_aux_loss_coef", "time_step_limit"}  # and mamba_..., of layers that are refused


def written(model_type, **changes):
    """A config.json of transformers with all keys of its class."""
    given = SMALL | FAMILY.get(model_type, {}) | changes
    return transformers.AutoConfig.for_model(model_type, **copy.deepcopy(given)).to_dict()


def meaning(config):
    """All that is made of a config.json but the ids that end a text."""
    return parse_config(config), granite_factors(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_counts_or_is_harmless(model_type):
    """Another value of any key of transformers' class changes the model or is refused."""
    config = written(model_type)
    if model_type in ("qwen2", "qwen3", "smollm3"):
        config.pop("no_rope_layers", None)
        assert "sliding_attention" in config.pop("layer_types")  # which would say it all
    base = meaning(config)
    ignored = HARMLESS | (EXPERTS if model_type == "granitemoehybrid" else set())
    others = {"rope_parameters": ROPE["linear"], "layer_types": ["full_attention"] * 2,
              "no_rope_layers": [0, 0, 0], "head_dim": 20, "num_key_value_heads": 2,
              "num_attention_heads": 8, "max_window_layers": 2, "no_rope_layer_interval": 3,
              "num_local_experts": 8}
    for key in config.keys() - ignored:
        if key.startswith("mamba_"):
            continue
        value = config[key]
        new = others.get(key, not value if isinstance(value, bool) else value * 2
                         if isinstance(value, (int, float)) else "another")
        try:
            assert meaning(config | {key: new}) != base, key
        except ValueError:
            pass


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_family_leaves_out_is_as_in_transformers(model_type):
    """Without any one key, a config.json means what transformers reads in it, or is refused."""
    config, cls = written(model_type), type(transformers.AutoConfig.for_model(model_type))
    parse_config(config)
    for key in config.keys() - {"model_type"}:
        short = {name: value for name, value in config.items() if name != key}
        try:
            ours = parse_config(short)
            theirs = cls.from_dict(copy.deepcopy(short)).to_dict()
        except (ValueError, StrictDataclassError):
            continue
        assert ours == parse_config(theirs), key


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "smollm3", "phi3", "olmo3"])
@pytest.mark.parametrize("old", [
    {"rope_scaling": YARN}, {"rope_scaling": YARN, "rope_theta": 99.0},
    {"rope_scaling": YARN | {"rope_theta": 99.0}, "rope_theta": 77.0},
    {"rope_theta": 77.0}, {"rope_scaling": YARN, "original_max_position_embeddings": 64},
    {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}])
@pytest.mark.parametrize("new", [
    None, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 99.0},
    {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}])
def test_two_spellings_of_rope(model_type, old, new):
    """Where they disagree, they are read as transformers does, or refused."""
    config = SMALL | {"model_type": model_type} | copy.deepcopy(old)
    if new is not None:
        config["rope_parameters"] = new
    try:
        ours = parse_config(copy.deepcopy(config))
    except ValueError as error:
        assert any(word in str(error) for word in ("rope", "factor", "original"))
        assert new or model_type in ("phi3", "olmo3") or "type" in old["rope_scaling"]
        return
    try:
        theirs = transformers.AutoConfig.for_model(**config)
    except Exception:  # noqa: BLE001
        return
    if model_type == "olmo3" and ("rope_theta" in old or "type" in old["rope_scaling"]):
        return  # transformers gives the old key to one kind of layers alone, and forgets the type
    if "original_max_position_embeddings" in old:  # read when the model is made
        theirs.standardize_rope_params()
    assert ours == parse_config({k: v for k, v in theirs.to_dict().items()
                                 if k != "original_max_position_embeddings"
                                 or model_type == "phi3"})


@pytest.mark.parametrize("scaling, reach, default", [
    (YARN, 128, 128), (YARN | {"factor": 16.0}, 512, 512), ({"type": "linear", "factor": 3.0},
                                                           192, 64)])
def test_longer_texts_than_max_position_embeddings(scaling, reach, default):
    config = LLAMA | {"max_position_embeddings": 64, "rope_scaling": scaling}
    assert parse_config(config).context == default
    assert parse_config(config, reach).context == reach
    with pytest.raises(ValueError, match=f"context {reach + 1} is outside 1 to {reach}"):
        parse_config(config, reach + 1)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt2"}, "'gpt2'.*supported are llama, .*transformers_model.py"),
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
    ({"rope_interleaved": True}, "rope_interleaved is True"),
    ({"final_logit_softcapping": 30.0}, "softcapping is 30.0; only None is supported"),
    ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is"),
    ({"max_position_embeddings": None}, "max_position_embeddings is None"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    ({"rope_theta": None}, "rope_theta is None"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types gives 3 layers a window, but by"),
    ({"layer_types": ["chunked_attention"] * 3}, "layer_types is"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
     "'dynamic'.*default, linear, llama3, yarn"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}}, "truncate is 'no'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0}},
     "attention_factor is -1.0"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ({"rope_parameters": ROPE["llama3"] | {"low_freq_factor": 4.0}}, "low_freq_factor is 4.0"),
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


def test_what_counts_in_one_place_alone():
    """A bias of o in some families; beside a part about images, the text's own ends."""
    for model_type, biased in (("llama", True), ("qwen3", True), ("qwen2", False),
                               ("mistral", False), ("ministral3", False)):
        assert parse_config(written(model_type) | {"attention_bias": True}).o_bias == biased
    text = {"model_type": "ministral3", "eos_token_id": 2}
    found = text_part({"model_type": "mistral3", "text_config": text, "eos_token_id": [5]})
    assert found == text | {"eos_token_id": [5], "tie_word_embeddings": True}


def test_put_errors():
    model = Model(parse_config(LLAMA))
    with pytest.raises(ValueError, match="q_proj.*shape"):
        put(model, "model.layers.0.self_attn.q_proj.weight", torch.zeros(32, 31))
    with pytest.raises(ValueError, match="layers.3.*shape"):
        put(model, "model.layers.3.self_attn.q_proj.weight", torch.zeros(32, 32))


@pytest.mark.parametrize("name, weights, theta, context, n_heads, n_kv_heads, window", [
    ("llama-2-7b", 6_738_415_616, 1e4, 4096, 32, 32, None),
    ("llama-2-13b", 13_015_864_320, 1e4, 4096, 40, 40, None),
    ("llama-2-70b", 68_976_648_192, 1e4, 4096, 64, 8, None),
    ("llama-3-8b", 8_030_261_248, 5e5, 32768, 32, 8, None),
    ("llama-3-70b", 70_553_706_496, 5e5, 32768, 64, 8, None),
    ("llama-3.2-1b", 1_235_814_400, 5e5, 131072, 32, 8, None),
    ("mistral-7b", 7_241_732_096, 1e4, 32768, 32, 8, 4096),
    ("qwen2.5-0.5b", 494_032_768, 1e6, 32768, 14, 2, None),
    ("qwen2.5-1.5b", 1_543_714_304, 1e6, 32768, 12, 2, None)])
def test_known_models(name, weights, theta, context, n_heads, n_kv_heads, window):
    """They are as large as their makers say."""
    config = KNOWN_MODELS[name]
    assert sum(map(math.prod, tensor_shapes(config).values())) == weights
    assert (config.rope_theta, config.context, config.sliding_window) == (theta, context, window)
    assert (config.n_heads, config.n_kv_heads) == (n_heads, n_kv_heads)
    assert config.norm_eps == (1e-6 if "qwen" in name else 1e-5)
    assert bool(config.rope_divisors) == (name == "llama-3.2-1b")
    if config.rope_divisors:  # of the slowest pairs, and of the fastest
        assert config.rope_divisors[-1] == 32 and config.rope_divisors[0] == 1


def test_yarn_that_shortens_scores_nothing():
    assert yarn_factor({}, 0.5) == yarn_factor({}, 1.0) == 1
    assert yarn_factor({}, math.e) == pytest.approx(1.1)
