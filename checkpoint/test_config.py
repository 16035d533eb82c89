"""config.json -> Config, in both spellings; what it and `put` refuse."""

import copy
import math

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError

from checkpoint.config import FAMILIES, parse_config, text_part
from checkpoint.conftest import LLAMA, ROPE, SMALL
from checkpoint.known_models import KNOWN_MODELS
from checkpoint.rope import yarn_factor
from checkpoint.tensors import tensor_shapes
from checkpoint.unify import granite_factors

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
    "return_dict", "transformers_version", "use_cache",
    "eos_token_id"}  # it ends a text: folder_tokenizer.py
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
        assert new not in (None, {"rope_type": "default"}) or model_type in ("phi3", "olmo3") or (
            "rope_type" in old["rope_scaling"])
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


PHI = LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
LONG = PHI | {"original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
OLD = LONGROPE | {"rope_type": None, "type": "su"}


@pytest.mark.parametrize("config, scaling, reach, default", [
    (LLAMA, YARN, 128, 128), (LLAMA, YARN | {"factor": 16.0}, 512, 512),
    (LLAMA, {"type": "linear", "factor": 3.0}, 192, 64), (LONG, OLD, 64, 16)])
def test_longer_texts_than_max_position_embeddings(config, scaling, reach, default):
    config = config | {"max_position_embeddings": 64, "rope_scaling": scaling}
    assert parse_config(config).context == default
    assert parse_config(config, reach).context == reach
    with pytest.raises(ValueError, match=f"context {reach + 1} is outside 1 to {reach}"):
        parse_config(config, reach + 1)


GRANITE = LLAMA | {"model_type": "granitemoehybrid", "shared_intermediate_size": 44,
                   "architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 0,
                   "layer_types": ["attention"] * 3, "position_embedding_type": "rope"}
OLMO = LLAMA | {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "sliding_window": 8,
                "num_hidden_layers": 4}
NOT_LLAMA = "experts, Mamba layers or no RoPE"


@pytest.mark.parametrize("config, change, words", [
    (LLAMA, {"model_type": "gpt2"}, "'gpt2'.*supported are llama, .*transformers_model.py"),
    (LLAMA, {"model_type": "qwen2"}, "LlamaForCausalLM.*supported are"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClass"),
    (LLAMA, {"model_type": "smollm3", "architectures": None, "no_rope_layers": [1]},
     "no_rope_layers is"),
    *((LLAMA, {key: value}, f"{key} is {value!r}") for key, value in [
        ("hidden_size", "many"), ("hidden_act", "gelu"), ("rope_scaling", "linear"),
        ("num_hidden_layers", -1), ("num_hidden_layers", True), ("num_key_value_heads", 3),
        ("head_dim", 7), ("rope_interleaved", True), ("rms_norm_eps", math.nan),
        *((key, None) for key in (
            "hidden_size", "max_position_embeddings", "rms_norm_eps", "rope_theta"))]),
    (LLAMA, {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "softcapping is 30.0; only None is supported"),
    (LLAMA, {"layer_types": ["sliding_attention"] * 3}, "layer_types gives 3 layers a window, but"),
    (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
     "'dynamic'.*default, linear, llama3, yarn"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}},
     "truncate is 'no'"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0}},
     "attention_factor is -1.0"),
    (LLAMA, {"factor": 4.0, "rope_scaling": {"rope_type": "linear"}}, "factor is None"),
    (LLAMA, {"rope_parameters": ROPE["llama3"] | {"low_freq_factor": 4.0}}, "freq_factor is 4.0"),
    (PHI, {"partial_rotary_factor": 0.4}, "3 of a head's 8 channels turn"),
    (PHI, {"partial_rotary_factor": 0.0}, "0 of a head's 8 channels turn"),
    (PHI, {"rope_scaling": LONGROPE}, "original_max_position_embeddings is None"),
    (PHI, {"rope_scaling": LONGROPE, "original_max_position_embeddings": 1}, "embeddings is 1"),
    (LONG, {"rope_scaling": LONGROPE | {"short_factor": [1.0] * 3}}, "short_factor is .*list of 4"),
    (LONG, {"rope_scaling": LONGROPE | {"short_factor": [1.0] * 3 + ["a"]}}, "factor is 'a'"),
    (GRANITE, {"num_local_experts": 8}, NOT_LLAMA), (GRANITE, {"layer_types": None}, NOT_LLAMA),
    (GRANITE, {"layer_types": ["attention", "mamba", "mamba"]}, NOT_LLAMA),
    (GRANITE, {"position_embedding_type": "nope"}, NOT_LLAMA),
    (OLMO, {"layer_types": ["full_attention"]}, "layer_types is .*a list of 4 values, sliding"),
    (OLMO, {"layer_types": [["full_attention"]] * 4}, "layer_types is "),
    (OLMO, {"rope_parameters": {"full_attention": 3}}, "the latter plain RoPE"),
    (OLMO, {"rope_parameters": {"full_attention": ROPE["yarn"], "sliding_attention": ROPE["yarn"]}},
     "the latter plain RoPE"),
    (OLMO, {"rope_parameters": {"full_attention": ROPE["yarn"],
                                "sliding_attention": {"rope_theta": 99.0}}}, "the latter plain")])
def test_config_errors(config, change, words):
    parse_config(config)
    with pytest.raises(ValueError, match=words) as error:
        parse_config(config | change)
    assert "\n" not in str(error.value)


def test_what_counts_in_one_place_alone():
    """Of RoPE's settings, RoPE's; a bias of o in some families; beside a part about images, the
    text's own ends."""
    assert parse_config(LLAMA) == parse_config(LLAMA | {"rope_scaling": {
        "rope_type": "default", "hidden_size": 64, "num_hidden_layers": 9}})
    for model_type, biased in (("llama", True), ("qwen3", True), ("qwen2", False),
                               ("mistral", False), ("ministral3", False)):
        assert parse_config(written(model_type) | {"attention_bias": True}).o_bias == biased
    text = {"model_type": "ministral3", "eos_token_id": 2}
    found = text_part({"model_type": "mistral3", "text_config": text, "eos_token_id": [5]})
    assert found == text | {"eos_token_id": [5], "tie_word_embeddings": True}
    assert not text_part({"model_type": "qwen3_vl", "text_config": text})["tie_word_embeddings"]


def test_context_of_longrope():
    """Within the original context the short list holds, for all who do not ask for more."""
    config = LONG | {"rope_scaling": OLD, "max_position_embeddings": 64}
    found = [parse_config(config, context) for context in (None, 5, 16, 17, 64)]
    assert [c.context for c in found] == [16, 5, 16, 17, 64]
    assert [c.rope_divisors[0] for c in found] == [1.0, 1.0, 1.0, 2.0, 2.0]


def test_layers_of_olmo3():
    """By layer_types, or every fourth; RoPE's settings flat, as in old configs, or by layer."""
    yarn, plain = ROPE["yarn"], {"rope_type": "default", "rope_theta": 10000.0}
    flat = parse_config(OLMO | {"rope_theta": 10000.0, "rope_scaling": yarn})
    nested = parse_config(OLMO | {"rope_parameters": {"full_attention": yarn,
                                                      "sliding_attention": plain}})
    assert flat == nested and flat.full_layers == (3,)
    assert [flat.window(i) for i in range(4)] == [8, 8, 8, None]
    assert [flat.rope_kind(i) for i in range(4)] == ["plain"] * 3 + ["scaled"]
    kinds = ["full_attention", "sliding_attention"] * 2
    assert parse_config(OLMO | {"layer_types": kinds}).full_layers == (0, 2)
    assert parse_config(OLMO).rope_theta == 5e5


def test_ministral_without_yarn():
    """Its queries grow with the original context, which YaRN alone can take from elsewhere."""
    rope = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
    config = LLAMA | {"model_type": "ministral3", "architectures": None, "rope_parameters": rope}
    with pytest.raises(ValueError, match="original_max_position_embeddings is None"):
        parse_config(config)
    rope["original_max_position_embeddings"] = 16
    assert parse_config(config).query_growth == (0.1, 16)
    del rope["llama_4_scaling_beta"]
    assert parse_config(config).query_growth == (0.0, 1)


@pytest.mark.parametrize("name, weights, theta, context, window", [
    ("llama-2-7b", 6_738_415_616, 1e4, 4096, None),
    ("llama-2-13b", 13_015_864_320, 1e4, 4096, None),
    ("llama-2-70b", 68_976_648_192, 1e4, 4096, None),
    ("llama-3-8b", 8_030_261_248, 5e5, 32768, None),
    ("llama-3-70b", 70_553_706_496, 5e5, 32768, None),
    ("llama-3.2-1b", 1_235_814_400, 5e5, 131072, None),
    ("mistral-7b", 7_241_732_096, 1e4, 32768, 4096),
    ("qwen2.5-0.5b", 494_032_768, 1e6, 32768, None),
    ("qwen2.5-1.5b", 1_543_714_304, 1e6, 32768, None)])
def test_known_models(name, weights, theta, context, window):
    """They are as large as their makers say."""
    config = KNOWN_MODELS[name]
    assert sum(map(math.prod, tensor_shapes(config).values())) == weights
    assert (config.rope_theta, config.context, config.sliding_window) == (theta, context, window)
    assert config.norm_eps == (1e-6 if "qwen" in name else 1e-5)
    if name == "llama-3.2-1b":  # of the fastest pairs, and of the slowest
        assert config.rope_divisors[0] == 1 and config.rope_divisors[-1] == 32


def test_yarn_that_shortens_scores_nothing():
    assert yarn_factor({}, 0.5) == yarn_factor({}, 1.0) == 1
    assert yarn_factor({}, math.e) == pytest.approx(1.1)
