"""model.py against transformers: the same logits from the same random weights, for every family
and for odd shapes."""

import dataclasses
import random

import pytest
import torch
import transformers

from checkpoint.config import parse_config
from checkpoint.conftest import CASES, ROPE, SMALL, pair
from model import Config, KVCache, Model, rotation
from session import Session


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_logits_and_greedy_tokens(name):
    theirs, ours = pair(name)
    tokens = torch.randint(SMALL["vocab_size"], (80,))
    expected = theirs(tokens[None]).logits[0]
    assert expected.std() > 0.1  # far from trivial

    def check(logits):
        assert (logits - expected).abs().max() <= 1e-4

    check(ours.logits(ours.forward(tokens)))  # the whole text, without a cache
    # prefill; token by token; chunks of prefill between tokens
    first = random.randint(1, 39)
    for sizes in ([80], [1] * 80, [1, 17, 1, 1, 40, 20], [first, 40 - first, 1, 39]):
        cache = KVCache(ours.config, 80)
        check(torch.cat([ours.logits(ours.forward(chunk, cache))
                         for chunk in tokens.split(sizes)]))
        assert cache.length == 80
    with pytest.raises(ValueError, match="81 tokens do not fit"):
        ours.forward(tokens[:1], cache)
    ids = list(Session(ours, context=80).generate(tokens[:40].tolist(), 32))  # by decode steps
    text = torch.cat((tokens[:40], torch.tensor(ids)))
    assert ids == theirs(text[None]).logits[0, 39:-1].argmax(-1).tolist() and len(ids) == 32


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
