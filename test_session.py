"""A session: the same tokens as transformers and as the plain forward pass, honest counts,
sampling."""

import dataclasses
import math
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers

import benchmark
import checkpoint
import session as session_module
from calibrations.thresholds import find
from checkpoint.default_model import fetch
from checkpoint.gguf_file import GGUFFile
from checkpoint.tensors import put, tensor_shapes
from cli.accounting import block_bytes, other_bytes, tensors, tokens_attended
from cli.report import warn_of_sparsity
from conftest import CONFIGS, DEVICE, PROMPTS, ask, random_model
from generate import generate_tokens
from model import Config, KVCache, Linear, Model, dense, masked
from quantize import Int8Linear, int4_linear
from sampling import penalize, sample
from session import Session

# ---- tokens ------------------------------------------------------------------------------------


@torch.inference_mode()
def test_greedy_equals_transformers(smollm):
    model, tokenizer = smollm
    file, stop = fetch(), sorted(tokenizer.eos_ids)
    config = GGUFFile(file).config() | {"pad_token_id": 0, "eos_token_id": stop}
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        None, config=transformers.LlamaConfig(**config), dtype=torch.float32,
        state_dict=dict(checkpoint.open_checkpoint(file).tensors))
    theirs.generation_config.eos_token_id = stop
    for prompt in PROMPTS[0], PROMPTS[-1]:
        ids = ask(tokenizer, prompt)
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
        expected = [id for id in expected[0, len(ids):].tolist() if id not in stop]
        assert list(generate_tokens(model, ids, 16, stop=stop)) == expected


def plain_tokens(model, prompt, n, thresholds=None):
    """n greedy ids by `model.forward` alone, and the rows kept by the steps, int64 [n_layers,
    7]."""
    kept = torch.zeros(model.config.n_layers, 7, dtype=torch.int64)

    def project(x, linear):
        if thresholds is None:
            return dense(x, linear)
        for place in range(7)[linear.places]:
            keep = ~(x.float().abs() <= thresholds[linear.layer, place])
            kept[linear.layer, place] += keep.sum().item()
        return masked(x, linear, thresholds[linear.layer, linear.places].to(x.device))

    cache = KVCache(model.config, len(prompt) + n, model.dtype, model.device)
    logits = model.logits(model.forward(torch.tensor(prompt, device=model.device), cache)[-1:])
    tokens = [logits.argmax().item()]
    while len(tokens) < n:
        token = torch.tensor(tokens[-1:], device=model.device)
        logits = model.logits(model.forward(token, cache, project))
        tokens.append(logits.argmax().item())
    return tokens, kept


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_session_equals_the_plain_forward_pass(name, sparsity):
    """Prefill and steps of the device's own decoder give the tokens of `model.forward`."""
    model = random_model(CONFIGS[name])
    prompt = torch.randint(0, 101, (40,)).tolist()
    thresholds = torch.full((2, 7), 0.3) if sparsity else None
    tokens, kept = plain_tokens(model, prompt, 24, thresholds)
    session = Session(model, thresholds)
    assert list(session.generate(prompt, 24)) == tokens
    if sparsity:
        assert 0.05 < session.sparsity() < 0.8
        if DEVICE == "cpu":  # a GPU is a step ahead; rounding may decide a row at the threshold
            assert (session.decoder.kept - kept).abs().max() <= 2
    else:
        assert session.sparsity() == 0


def test_realised_sparsity(smollm):
    model, tokenizer = smollm
    session = Session(model, find(model).thresholds(0.4))
    for prompt in PROMPTS[:2]:
        assert len(list(session.generate(ask(tokenizer, prompt), 32))) == 32
    assert 0.38 <= session.sparsity() <= 0.42


def test_generator():
    model, ids = random_model(CONFIGS["llama"]), torch.randint(0, 101, (20,)).tolist()
    tokens = generate_tokens(model, ids, 12)
    first = [next(tokens) for _ in range(4)]  # one by one
    tokens.close()
    whole = list(generate_tokens(model, ids, 12))
    assert whole[:4] == first and len(whole) == 12
    assert all(isinstance(token, int) for token in whole)
    assert list(generate_tokens(model, ids, 12, stop=[whole[5]])) == whole[:whole.index(whole[5])]
    for kind in tuple, torch.tensor, np.array:
        assert list(generate_tokens(model, kind(ids), 12)) == whole

    session = Session(model)
    old, new = session.generate([1, 2, 3], 8), session.generate(ids, 12)
    next(old)
    assert next(new) == whole[0] and session.ended is None
    with pytest.raises(ValueError, match="has started another generation"):
        next(old)
    assert list(new) == whole[1:]
    options = dict(temperature=1.0, top_k=50, top_p=0.9)
    runs = [list(generate_tokens(model, ids, 16, seed=seed, **options)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_a_conversation_reuses_its_cache(penalty):
    """Each answer is that of a fresh session, which reads the whole text, with a penalty for the
    tokens of this text alone; so it is where the same prompt comes again, or another one."""
    model = random_model(CONFIGS["llama"])
    session = Session(model, repetition_penalty=penalty)

    def answer(text, n):
        answer = list(session.generate(text, n))
        assert answer == list(generate_tokens(model, text, n, repetition_penalty=penalty))
        return answer

    prompt, other = torch.randint(0, 101, (2, 40)).tolist()
    text = list(prompt)
    for question, n_read in ([], 40), ([7, 8], 3), ([9], 2):  # with the last answer's last token
        text += question
        before = session.stats.prompt_tokens
        text += answer(text, 6)
        assert session.stats.prompt_tokens - before == n_read
    for text in prompt, prompt, other, prompt:
        answer(text, 24)


# ---- sampling ----------------------------------------------------------------------------------


def draws(logits, n, **options):
    generator = torch.Generator().manual_seed(1)
    return torch.cat([sample(logits, generator=generator, **options) for _ in range(n)])


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.5, "top_k": 1000}, {"top_k": 7}, {"top_p": 0.8},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.7}])
def test_sample_probabilities(options):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    # By the definition, one token at a time.
    exact = [math.exp(logit / options.get("temperature", 1)) for logit in logits.tolist()]
    order = sorted(range(40), key=lambda i: -exact[i])[: options.get("top_k", 40)]
    total, reached, kept = sum(exact[i] for i in order), 0.0, []
    for i in order:
        if reached / total >= options.get("top_p", 1):
            break
        kept.append(i)
        reached += exact[i]
    expected = torch.zeros(40, dtype=torch.float64)
    expected[kept] = torch.tensor([exact[i] / reached for i in kept], dtype=torch.float64)

    n = 3000
    counts = torch.bincount(draws(logits, n, **options), minlength=40)
    assert counts[expected == 0].sum() == 0
    likely = expected * n >= 5  # where the chi-square statistic is one
    chi_square = ((counts - expected * n) ** 2 / (expected * n))[likely].sum().item()
    freedom = likely.sum().item()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_sample_corners():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    best = logits.argmax().item()
    for options in ({"temperature": 0}, {"temperature": 1e-30}, {"temperature": 1e-46},
                    {"temperature": 5e-324, "top_k": 9}, {"top_k": 1}, {"top_p": 0},
                    {"top_p": 1e-9}, {"min_p": 1.0}):
        assert set(draws(logits, 20, **options).tolist()) == {best}
    assert sample(torch.zeros(5), temperature=0).shape == (1,)
    ties = torch.tensor([0.0, 1, 1, 1])
    assert set(draws(ties, 50, top_p=0.5).tolist()) == {1, 2}  # of equals the first ones
    for top_p, n in (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4):  # reached, not passed
        assert set(draws(torch.zeros(4), 100, top_p=top_p).tolist()) == set(range(n))
    halves = torch.tensor([0.0, -math.log(2), -math.log(4)])
    assert set(draws(halves, 200, min_p=0.49).tolist()) == {0, 1}
    assert set(draws(torch.zeros(3), 100, min_p=1).tolist()) == {0, 1, 2}
    masked = torch.tensor([0.0, -math.inf, 0, -math.inf])
    assert set(draws(masked, 100).tolist()) == {0, 2}
    half = draws(logits.bfloat16(), 50, top_k=3)
    assert set(half.tolist()) <= set(logits.bfloat16().topk(3).indices.tolist())


def test_penalty_and_min_p_are_those_of_transformers():
    logits = torch.randn(60, generator=torch.Generator().manual_seed(2)) * 3
    ids = torch.tensor([[3, 5, 5, 17]])
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits[None].clone())[0]
    seen = torch.zeros(60, dtype=torch.bool)
    seen[ids[0]] = True
    assert torch.equal(penalize(logits, seen, 1.3), expected)
    kept = transformers.MinPLogitsWarper(0.05)(None, logits[None].clone())[0].isfinite()
    drawn = torch.bincount(draws(logits, 5000, min_p=0.05), minlength=60) > 0
    assert not (drawn & ~kept).any() and drawn.sum() >= kept.sum() - 2 > 0


@pytest.mark.parametrize("token", [-1, 2**40])
def test_a_penalty_bears_any_token(monkeypatch, token):
    """-1 stands for broken logits; while a decoder compiles its kernels, a token is any number."""
    monkeypatch.setattr(session_module, "likeliest", lambda logits: torch.tensor([token]))
    session = Session(random_model(CONFIGS["llama"], device="cpu"), repetition_penalty=1.1)
    assert session.choose(torch.zeros(101)).tolist() == [token]


def test_repetition_penalty_over_a_text():
    """Greedy with a penalty is transformers' definition, step by step, in the prompt too."""
    model, ids = random_model(CONFIGS["llama"], device="cpu"), [*range(0, 101, 2)]
    processor, text = transformers.RepetitionPenaltyLogitsProcessor(1.5), list(ids)
    while len(text) < len(ids) + 20:
        logits = model.logits(model.forward(torch.tensor(text))[-1:])
        text.append(processor(torch.tensor([text]), logits)[0].argmax().item())
    assert list(generate_tokens(model, ids, 20, repetition_penalty=1.5)) == text[len(ids):]


# ---- numbers that are none ---------------------------------------------------------------------


def sound_model(dtype=torch.float32):
    """A model of random weights with a context of 32."""
    config = Config(64, 32, 48, 3, 4, 2, 8, context=32)
    model, generator = Model(config, dtype), torch.Generator().manual_seed(0)
    for name, shape in tensor_shapes(config).items():
        put(model, name, torch.randn(shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("dtype, words", [
    (torch.float16, "float16 ends at 65504, so try --dtype bfloat16"),
    (torch.bfloat16, "try --dtype float32, or another checkpoint"),
    (torch.float32, "try another checkpoint")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_infinite_logits_are_told(dtype, words, temperature):
    """And not drawn from; the tokens that led to them are not held."""
    session = Session(sound_model(dtype), temperature=temperature)
    tokens = session.generate([1, 2, 3], 8)
    next(tokens)
    session.cache.k[1, :, 2] = math.nan
    with pytest.raises(ValueError, match=f"infinite or NaN at token 4 of the text; {words}"):
        next(tokens)
    session = Session(session.model, temperature=temperature)
    list(session.generate([1, 2, 3], 4))
    session.model.embedding[7] = math.inf
    with pytest.raises(ValueError, match=f"infinite or NaN at token 3 of the text; {words}"):
        next(session.generate([1, 2, 7], 4))
    assert session.tokens == [1, 2]
    for value in math.inf, -math.inf, math.nan:
        assert session.choose(torch.tensor([0.0, value, 1.0])).tolist() == [-1]


# ---- what is read -----------------------------------------------------------------------------


def test_bytes_read_stop_at_the_sliding_window():
    model = random_model(CONFIGS["mistral"])  # a window of 20
    session = Session(model)
    assert len(list(session.generate([1] * 15, 11))) == 11
    seen = [16, 17, 18, 19, 20, 20, 20, 20, 20, 20]  # by each of the ten steps
    token = 2 * 2 * 4 * 16 * 4  # keys and values of one, in bytes
    weights = block_bytes(model) + other_bytes(model)
    assert session.bytes_per_token() == weights + sum(seen) / 10 * token
    half = dataclasses.replace(model.config, full_layers=(1,))  # of the two layers
    assert [tokens_attended(half, n) for n in (10, 20, 30)] == [10, 20, 25]


@pytest.mark.parametrize("sampling", [
    {}, {"repetition_penalty": 1.2}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}])
def test_the_whole_lm_head_says_the_same(sampling, any_head):
    """Fewer rows of it are read, and counted."""
    config = Config(3000, 64, 96, 2, 4, 2, 16, context=160)
    model, texts, sessions = random_model(config), [], []
    for head in ("auto", "whole"):
        session = Session(model, head=head, **sampling)
        texts.append(list(session.generate([5, 6, 7], 40)))
        sessions.append(session)
    auto, whole = (session.measured() for session in sessions)
    assert texts[0] == texts[1]
    assert whole.head_rows == 3000 * whole.decoder_steps > 4 * auto.head_rows > 0
    rows = auto.head_rows / auto.decoder_steps
    saved = (3000 - rows) * 64 * 4 - model.lm_head.certificate.nbytes
    both = [session.bytes_per_token() for session in sessions]
    assert both[1] - both[0] == pytest.approx(saved) and saved > 0


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", [Linear, Int8Linear, int4_linear])
def test_every_byte_that_the_model_holds_is_counted(kind, tie):
    """A step that drops nothing reads all of it once; of an embedding of its own, a row. A row
    counts with its share of the scales."""
    config = Config(64, 32, 96, 2, 2, 2, 16, qk_norm="head", qkv_bias=True, tie_embeddings=tie)
    model = Model(config, torch.bfloat16, linear_class=kind)
    held = {value.data_ptr(): value.nbytes
            for thing in (model, *model.blocks, *model.linears(), model.lm_head)
            for name, value in vars(thing).items()
            if torch.is_tensor(value) and name != "embedding"}
    row = 0 if model.embedding is None else 32 * 2
    assert block_bytes(model) + other_bytes(model) == sum(held.values()) + row
    kept = torch.zeros(2, 7, dtype=torch.int64)
    assert block_bytes(model, kept) == 0
    kept[1, 6] = 3
    down = sum(tensor.nbytes for tensor in tensors(model.blocks[1].down) if tensor.dim() > 1)
    assert block_bytes(model, kept) == 3 * down / 96


@pytest.mark.skipif(DEVICE != "cpu" or not os.access("/proc/self/clear_refs", os.W_OK),
                    reason="Linux tells which memory of a CPU was touched")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_bytes_counted_are_those_touched(quantize):
    """By the processor's marks: those of a step that reads gate, up and down, less those of one
    that drops them."""
    config = Config(512, 512, 8192, 2, 4, 4, 128, context=8)
    model = benchmark.random_model(config, torch.bfloat16, "cpu", quantize)
    thresholds = torch.full((2, 7), -1.0)
    for attempt in range(5):  # the system may look at the marks, too, and clear them
        touched = counted = 0
        for sign, t in (1, -1.0), (-1, math.inf):
            thresholds[:, 4:] = t
            session = Session(model, thresholds)
            tokens = session.generate([1, 2], 3)
            next(tokens)
            next(tokens)
            Path("/proc/self/clear_refs").write_text("1")
            next(tokens)
            with open("/proc/self/smaps") as lines:
                touched += sign * sum(int(line.split()[1]) << 10 for line in lines
                                      if line.startswith("Referenced:"))
            counted += sign * session.bytes_per_token()
        assert counted == pytest.approx(block_bytes(model) * 3 / (3 + 4 * 512 / 8192), rel=0.01)
        if abs(touched - counted) < 0.1 * counted:
            return
    pytest.fail(f"{touched} bytes were touched, {counted} counted")


@pytest.mark.skipif(DEVICE != "cpu", reason="Ctrl-C does not cut a step of a GPU short")
def test_rows_of_a_step_cut_short_are_not_counted(monkeypatch):
    model, thresholds = random_model(CONFIGS["llama"]), torch.full((2, 7), 0.3)
    whole, cut = (Session(model, thresholds) for _ in range(2))
    list(whole.generate([1, 2, 3], 6))
    tokens = cut.generate([1, 2, 3], 6)
    next(tokens)

    def interrupted(token, position, read_token=cut.decoder.read_token):
        read_token(token, position)  # Python sees Ctrl-C when C returns
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cut.decoder, "read_token", interrupted)
        next(tokens)
    assert cut.decoder.n_steps == 0 and not cut.decoder.kept.any()
    list(cut.generate([1, 2, 3], 6))
    assert cut.decoder.n_steps == 5 and torch.equal(cut.decoder.kept, whole.decoder.kept)


@pytest.mark.parametrize("asked, n, warned", [
    (0.5, 66, False), (0.56, 66, True), (0.44, 66, True), (0.56, 63, False), (0, 66, False)])
def test_a_sparsity_that_was_not_asked_for(asked, n, warned, capsys):
    session = Session(random_model(CONFIGS["llama"]))
    list(session.generate([1, 2, 3], n))
    stats = session.measured()
    warn_of_sparsity(session, dataclasses.replace(stats, kept=stats.kept // 2), asked)
    assert ("reached 0.500; the calibration does not fit" in capsys.readouterr().err) == warned


def test_ctrl_c_while_a_prompt_is_read(monkeypatch):
    """The session holds the tokens that it computed, and the next prompt goes on behind them. In
    several chunks, it gives what it gives in one. A bar tells how far it is."""
    model, prompt = random_model(CONFIGS["llama"]), torch.randint(0, 101, (100,)).tolist()
    expected, _ = plain_tokens(model, prompt, 8)
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", {"cpu": 16, "cuda": 16})
    bars = mock.MagicMock(**{"return_value.__exit__.return_value": False})
    monkeypatch.setattr(session_module, "progress", bars)
    session, chunks = Session(model), []

    def interrupted(x, project, mlp=model.blocks[1].mlp):
        chunks.append(x)
        if len(chunks) == 2:  # in the second layer of the second chunk
            raise KeyboardInterrupt
        return mlp(x, project)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.blocks[1], "mlp", interrupted)
        next(session.generate(prompt, 8))
    n = len(session.tokens)
    assert session.tokens == prompt[:n] and n == session.cache.length == 16
    assert session.stats.prompt_tokens == 16
    for reader in session, Session(model):
        assert list(reader.generate(prompt, 8)) == expected
        assert reader.cache.length == len(reader.tokens) == 107
        assert reader.stats.prompt_tokens == 100
    assert [call.args[1] for call in bars.call_args_list] == [100, 84, 100]  # tokens to read
    assert bars.call_args.kwargs == {"delay": 2}
    update = bars.return_value.__enter__.return_value.update
    assert sum(call.args[0] for call in update.call_args_list) == 16 + 84 + 100


# ---- the Python API ----------------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    ({"temperature": -1}, "temperature is -1; expected a number from 0 to 100"),
    ({"temperature": math.nan}, "temperature is nan"), ({"temperature": "1"}, "temperature is '1'"),
    ({"top_k": -1}, "top_k is -1; expected a whole number from 0 on"), ({"top_k": 2.5}, "top_k"),
    ({"top_p": 1.01}, "top_p is 1.01"), ({"min_p": -0.1}, "min_p"), ({"seed": 2**64}, "seed"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"), ({"context": 33}, "1 to 32"),
    ({"head": "half"}, "head is 'half'"),
    ({"thresholds": torch.zeros(7)}, r"the thresholds are of shape \(7,\)"),
    ({"thresholds": torch.full((3, 7), math.nan)}, "NaN"),
])
def test_options_out_of_range(options, words):
    model = sound_model()
    with pytest.raises(ValueError, match=words):
        Session(model, **options)


@pytest.mark.parametrize("ids, n, words", [
    ([1, 64], 4, "the prompt holds token 64; the model's tokens are 0 to 63"),
    ([-1], 4, "token -1"), ([1.5], 4, "whole numbers"), ("text", 4, "a str"),
    (b"text", 4, "a bytes"), ({1, 2}, 4, "a set"), ({1: 2}, 4, "a dict"),
    ([], 4, "prompt is empty"), (torch.ones(1, 3, dtype=torch.int64), 4, "whole numbers"),
    ([1] * 33, 10, "has 33 tokens, more than the context of 32"),
    ([1] * 5, -1, "max_new_tokens is -1")])
def test_what_cannot_be_generated(ids, n, words):
    model = sound_model()
    for tokens in Session(model).generate(ids, n), generate_tokens(model, ids, n):
        with pytest.raises(ValueError, match=words):
            next(tokens)


@pytest.mark.parametrize("n, asked, new, ended", [
    (5, 3, 3, "length"), (5, 0, 0, "length"), (30, 2, 2, "length"), (30, 10, 2, "context"),
    (31, 10, 1, "context"), (32, 10, 1, "context")])  # a full context still gives one token
def test_prompts_around_the_context(n, asked, new, ended):
    session = Session(sound_model())
    assert len(list(session.generate([1] * n, asked))) == new and session.ended == ended
    assert len(list(generate_tokens(session.model, [1] * n, asked))) == new


def test_weights_beyond_the_type_or_of_another_shape():
    model, norm = sound_model(torch.float16), torch.ones(32)
    for value, words in (7e4, "torch.float16 ends at 65504"), (math.nan, "get a sound check"):
        norm[3] = value
        with pytest.raises(ValueError, match=f"model.norm.weight .* {words}"):
            put(model, "model.norm.weight", norm)
    for name, shape in ("model.norm", (1,)), ("model.layers.9.mlp.up_proj", (48, 32)):
        with pytest.raises(ValueError, match=f"{name}.weight has shape"):
            put(model, f"{name}.weight", torch.ones(shape))
