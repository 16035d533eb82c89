"""model.py against transformers: the same logits from the same random weights, for every family
and for odd shapes."""

import copy
import dataclasses
import random

import pytest
import torch
import transformers

from checkpoint.config import parse_config
from checkpoint.tensors import put, tensor_shapes
from checkpoint.unify import unify
from model import Config, KVCache, Model, rotation
from session import Session

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
               "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
             "original_max_position_embeddings": 32},
    "yarn, its numbers": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0,
                          "original_max_position_embeddings": 32, "beta_fast": 5.0,
                          "beta_slow": 0.5, "mscale": 0.9, "mscale_all_dim": 0.4,
                          "truncate": False},
    "yarn, its factor": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
                         "original_max_position_embeddings": 32, "attention_factor": 1.4},
}
ROPE["ministral"] = ROPE["yarn"] | {"mscale": 1.0, "mscale_all_dim": 1.0,
                                    "llama_4_scaling_beta": 0.7}
ROPE["olmo3"] = {"full_attention": ROPE["yarn"], "sliding_attention": ROPE["default"]}
for name, pairs, share in (("longrope", 4, 1.0), ("longrope of 3/4", 6, 0.75)):
    ROPE[name] = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": share,
                  "original_max_position_embeddings": 32,
                  "short_factor": [1 + i / 9 for i in range(pairs)],
                  "long_factor": [1 + i for i in range(pairs)]}
SMALL = dict(vocab_size=101, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
             num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False,
             initializer_range=0.2)
MULTIPLIERS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.2,
               "residual_multiplier": 0.22, "logits_scaling": 3.0}
PHI = {"pad_token_id": None}
CASES = {  # name: (class stem in transformers, changes to SMALL, rope)
    "llama-2": ("Llama", {}, "default"),
    "llama-3": ("Llama", {"num_key_value_heads": 2}, "llama3"),
    "llama-3.2, tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True},
                        "llama3"),
    "linear rope": ("Llama", {}, "linear"),
    "odd heads": ("Llama",
                  {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54},
                  "default"),
    "prime sizes": ("Llama",
                    {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 42,
                              "intermediate_size": 53}, "default"),
    "explicit head_dim": ("Llama", {"head_dim": 20, "num_key_value_heads": 2}, "default"),
    "llama with biases": ("Llama", {"attention_bias": True}, "default"),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 7}, "default"),
    "mistral, no window, head_dim": ("Mistral", {"sliding_window": None, "head_dim": 12},
                                     "default"),
    "ministral, a window on one layer": ("Ministral", {
        "num_key_value_heads": 2, "sliding_window": 7, "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "default"),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}, "default"),
    "qwen2, a window on the last layers, yarn": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "yarn"),
    "qwen3, a window on the first layer": ("Qwen3", {
        "head_dim": 12, "use_sliding_window": True, "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "default"),
    "smollm3, windows": ("SmolLM3", {
        "use_sliding_window": True, "sliding_window": 9, "no_rope_layer_interval": 2,
        "pad_token_id": None}, "yarn"),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12}, "default"),
    "qwen3, odd heads, tied, llama3 rope": (
        "Qwen3", {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10,
                  "tie_word_embeddings": True}, "llama3"),
    "qwen3, yarn": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12}, "yarn"),
    "qwen2, yarn": ("Qwen2", {"num_key_value_heads": 2}, "yarn, its numbers"),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "num_key_value_heads": 2,
                            "pad_token_id": None}, "default"),
    "smollm3, tied, biases": ("SmolLM3", {"no_rope_layers": [0, 1, 0], "attention_bias": True,
                                          "tie_word_embeddings": True, "pad_token_id": None},
                              "default"),
    "smollm3, every fourth, tied, biases": (
        "SmolLM3", {"num_hidden_layers": 5, "num_key_value_heads": 2, "attention_bias": True,
                    "tie_word_embeddings": True, "pad_token_id": None}, "default"),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}, "default"),
    "olmo2, odd heads, tied": (
        "Olmo2", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54,
                  "tie_word_embeddings": True}, "default"),
    "ministral3": ("Ministral3", {"num_key_value_heads": 2, "head_dim": 12,
                                  "pad_token_id": None}, "ministral"),
    "ministral3, odd heads, tied, window": ("Ministral3", {
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10, "pad_token_id": None,
        "tie_word_embeddings": True, "sliding_window": 30}, "ministral"),
    "olmo3": ("Olmo3", {"num_key_value_heads": 2, "sliding_window": 20, "pad_token_id": None,
                        "layer_types": ["sliding_attention", "full_attention",
                                        "sliding_attention"]}, "olmo3"),
    "olmo3, every fourth, odd heads": ("Olmo3", {
        "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54,
        "num_hidden_layers": 4, "sliding_window": 7, "pad_token_id": None}, "olmo3"),
    "granite": ("Granite", MULTIPLIERS | {"num_key_value_heads": 2}, "default"),
    "granite, odd heads, tied, biases": (
        "Granite", MULTIPLIERS | {"num_attention_heads": 9, "num_key_value_heads": 3,
                                  "hidden_size": 54, "attention_bias": True,
                                  "tie_word_embeddings": True}, "yarn"),
    "granite 4": ("GraniteMoeHybrid", MULTIPLIERS | {
        "num_key_value_heads": 2, "num_local_experts": 0, "shared_intermediate_size": 44,
        "layer_types": ["full_attention"] * 3, "position_embedding_type": "rope",
        "mamba_n_heads": 4, "tie_word_embeddings": True}, "default"),
    "phi-3": ("Phi3", PHI | {"num_key_value_heads": 2, "sliding_window": 20}, "default"),
    "phi-3, odd heads, tied": ("Phi3", PHI | {
        "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54,
        "tie_word_embeddings": True}, "default"),
    "phi-3, long context": ("Phi3", PHI | {"original_max_position_embeddings": 32},
                            "longrope"),
    "phi-3, long context, short text": (
        "Phi3", PHI | {"original_max_position_embeddings": 128}, "longrope"),
    "phi-4-mini": ("Phi3", PHI | {
        "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48,
        "original_max_position_embeddings": 32, "tie_word_embeddings": True},
        "longrope of 3/4"),
    "phi-4-mini, short text": ("Phi3", PHI | {
        "num_key_value_heads": 2, "hidden_size": 64,
        "original_max_position_embeddings": 128}, "longrope of 3/4"),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}, "default"),
}


def pair(name):
    """A random model of transformers and ours with its weights, from a fresh seed."""
    seed = random.randrange(2**32)
    print(f"{name}: seed {seed}")
    torch.manual_seed(seed)
    stem, changes, rope = CASES[name]
    config = getattr(transformers, f"{stem}Config")(
        **SMALL | changes, rope_parameters=copy.deepcopy(ROPE[rope]))
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{stem}ForCausalLM")(config).float().eval()
    for parameter_name, parameter in theirs.named_parameters():  # fresh ones are all 1 or all 0
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.2)
    config_json = config.to_dict() | {"architectures": [f"{stem}ForCausalLM"]}
    # Beyond its original context, longrope wants to be asked for.
    longer = changes.get("original_max_position_embeddings") == 32
    ours = Model(parse_config(config_json, 256 if longer else None))
    state = theirs.state_dict()
    _, read = unify(config_json, ours.config, {n: tuple(t.shape) for n, t in state.items()},
                    lambda name, part: state[name][part])
    for tensor_name in tensor_shapes(ours.config):
        put(ours, tensor_name, read(tensor_name))
    return theirs, ours


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_logits(name):
    theirs, ours = pair(name)
    tokens = torch.randint(SMALL["vocab_size"], (80,))
    expected = theirs(tokens[None]).logits[0]
    assert expected.std() > 0.1  # far from trivial

    def check(logits):
        assert (logits - expected).abs().max() <= 1e-4

    check(ours.logits(ours.forward(tokens)))  # the whole text, without a cache
    # prefill; token by token; chunks of prefill between tokens
    chunkings = [[80], [1] * 80, [1, 17, 1, 1, 40, 20]]
    chunkings.append([])
    while sum(chunkings[-1]) < 80:
        chunkings[-1].append(min(random.randint(1, 30), 80 - sum(chunkings[-1])))
    for sizes in chunkings:
        cache = KVCache(ours.config, 80)
        check(torch.cat([ours.logits(ours.forward(chunk, cache))
                         for chunk in tokens.split(sizes)]))
        assert cache.length == 80
    with pytest.raises(ValueError, match="81 tokens do not fit"):
        ours.forward(tokens[:1], cache)


@pytest.mark.parametrize("name", ["qwen3, yarn", "qwen2, yarn", "ministral3", "olmo3",
                                  "phi-3, long context", "phi-4-mini"])
@torch.inference_mode()
def test_long_texts(name):
    """Positions at the end of a stretched context, in prefill and in decode steps."""
    theirs, ours = pair(name)
    tokens = torch.randint(SMALL["vocab_size"], (256,))
    expected, cache = theirs(tokens[None]).logits[0], KVCache(ours.config, 256)
    for part in (tokens[:250], *tokens[250:].split(1)):
        start = cache.length
        logits = ours.logits(ours.forward(part, cache))
        assert (logits - expected[start:cache.length]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_greedy_tokens(name):
    """The decode step chooses the same 32 tokens as transformers."""
    theirs, ours = pair(name)
    tokens = torch.randint(SMALL["vocab_size"], (40,)).tolist()
    ids = list(Session(ours, context=80).generate(tokens, 32))
    for id in ids:
        assert theirs(torch.tensor([tokens])).logits[0, -1].argmax() == id
        tokens.append(id)
    assert len(ids) == 32


@pytest.mark.parametrize("rope", sorted(ROPE.keys() - {"longrope of 3/4", "olmo3"}))
def test_inv_freq(rope):
    config = transformers.LlamaConfig(**SMALL, rope_parameters=ROPE[rope])
    expected = transformers.LlamaForCausalLM(config).model.rotary_emb
    ours = parse_config(config.to_dict())
    torch.testing.assert_close(rotation(ours, "scaled")[0], expected.inv_freq, rtol=1e-6, atol=0)
    assert ours.rope_factor == pytest.approx(expected.attention_scaling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_are_exact_in_any_dtype(dtype):
    """RoPE of a far token, and a query's growth, against float64."""
    config = dataclasses.replace(Config(9, 8, 8, 1, 1, 1, 8), query_growth=(0.3, 10))
    (cos, sin, growth), = Model(config, dtype).rope(3001, 2).values()
    at = torch.tensor([3001, 3002], dtype=torch.float64)[:, None, None]
    angles = at * 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    for ours, exact in (cos, angles.cos()), (sin, angles.sin()), (
            growth, 1 + 0.3 * (at // 10).log1p()):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-4)
