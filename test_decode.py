"""The decode steps against the plain forward pass: on a CPU here, on a GPU, or in Triton's
interpreter.

test_sparse_gemv.py starts this file in the interpreter.
"""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch

from conftest import CONFIGS, DEVICE, INTERPRETED, KERNELS, random_model
from decode import CpuDecoder, decode_one_token
from gpu.decoder import GpuDecoder
from model import KVCache, Linear
from quantize import Int8Linear
from sampling import sample


def test_a_capture_takes_the_decoders_device_and_puts_back_what_it_changes(monkeypatch):
    """The current device need not be that of the tensors: else tokens could be read before they
    are written. Token, position, counts and random state stay. What is chosen while kernels are
    compiled may be any number: the trial step reads a token that exists."""
    held, notes, steps = [], [], []

    @contextlib.contextmanager
    def device_of(tensor):
        held.append(tensor.data_ptr())
        yield
        held.pop()

    def watched(name, result=mock.DEFAULT):
        def note(*arguments, **options):
            assert held == [decoder.x.data_ptr()], name
            notes.append(name)
            return result
        return note

    def step():
        steps.append((decoder.token.item(), decoder.position.item()))
        watched("step")()
        for name in state:
            getattr(decoder, name).add_(2**40)
        torch.rand(3, generator=generator)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("Stream", "CUDAGraph", "stream", "graph", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock(side_effect=watched(name)))
    torch.cuda.Event.side_effect = None
    torch.cuda.Event.return_value.record.side_effect = watched("record")
    torch.cuda.CUDAGraph.return_value.replay.side_effect = watched("replay")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(
        *size, **options))
    generator, model = torch.Generator().manual_seed(3), random_model(
        CONFIGS["llama"], device="cpu")
    decoder = GpuDecoder(model, KVCache(model.config, 160), None, [generator])
    decoder.step, state = step, {"token": 5, "position": 7, "kept": 2}
    for name, value in state.items():
        getattr(decoder, name).fill_(value)
    decoder.prepare()
    for name, value in state.items():
        assert (getattr(decoder, name) == value).all(), name
    assert torch.equal(torch.rand(9, generator=generator),
                       torch.rand(9, generator=torch.Generator().manual_seed(3)))
    assert len(steps) == 3 and steps[1] == (0, 158)  # the cache's last rows
    list(decoder.tokens(3))
    decoder.set_thresholds(torch.full((2, 7), 0.3))
    assert notes.count("graph") == 2 and notes.count("replay") == notes.count("record") == 3
    assert {"Stream", "stream", "current_stream"} <= set(notes) and not held


MIXED = dataclasses.replace(CONFIGS["qwen3"], qkv_bias=True, o_bias=True, sliding_window=20,
                            query_growth=(0.9, 8), no_rope_layers=(1,))
# The interpreter is slow: there, only what differs in kernels.
FAMILIES = CONFIGS if not INTERPRETED else {
    "mixed": MIXED} | {name: CONFIGS[name] for name in ("llama", "olmo3", "both forms")}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "linear", [Linear] + [Int8Linear] * (not INTERPRETED)
)  # a CPU packs int8
def test_step(name, linear):
    """Logits, tokens and counts of decode steps, a dense one and a sparse one, are those of the
    definition. A token of -1, which tells the host of NaN, counts as 0."""
    config = FAMILIES[name]
    model, prompt = random_model(config, linear), torch.randint(0, 101, (30,), device=DEVICE)
    ours, plain = (KVCache(config, 160, torch.float32, DEVICE) for _ in range(2))
    model.forward(prompt, ours), model.forward(prompt, plain)
    kept = torch.zeros(config.n_layers, 7, dtype=torch.int64, device=DEVICE)
    seen, token = [], torch.tensor([0], device=DEVICE)

    def choose(logits):
        seen.append(logits.clone())
        return sample(logits, 0)

    decoder = GpuDecoder(model, ours, choose, graph=False) if KERNELS else CpuDecoder(
        model, ours, choose)
    decoder.start(-1, len(prompt))
    for thresholds in (torch.full(kept.shape, -1.0), torch.rand(kept.shape) / 2):
        decoder.set_thresholds(thresholds)
        if KERNELS:  # not `tokens`: the interpreter's machine may lack its pinned memory
            decoder.advance()
        else:
            next(decoder.tokens(1))
        logits = decode_one_token(model, plain, token, thresholds.to(DEVICE), kept)
        token = logits.argmax(keepdim=True)
        assert (seen.pop(0) - logits).abs().max() <= 1e-4 * logits.abs().max()
        assert decoder.token.item() == token.item()
    assert decoder.n_steps == 2 and torch.equal(decoder.kept, kept)
    every_row = sum(linear.in_features * len(linear.ends) for linear in model.linears())
    assert every_row < kept.sum() < 2 * every_row


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_graph_and_kernels_choose_the_same_tokens():
    """Captured or kernel by kernel, greedy or drawn, they choose the tokens of the plain forward
    pass; the thresholds may change under the graph."""
    torch.manual_seed(0)
    model = random_model(CONFIGS["llama"])
    tables = [torch.full((2, 7), t, device=DEVICE) for t in (-1.0, 0.3)]
    for sampling in ((0, 0, 1.0), (0.8, 50, 0.95)):
        expected, counts, cache = [5], [], KVCache(model.config, 160, torch.float32, DEVICE)
        generator, kept = torch.Generator(DEVICE).manual_seed(3), torch.zeros(
            2, 7, dtype=torch.int64, device=DEVICE)
        for i in range(120):
            token = torch.tensor(expected[-1:], device=DEVICE)
            logits = decode_one_token(model, cache, token, tables[i // 60], kept)
            expected.append(sample(logits, *sampling, generator=generator).item())
        for graph in (True, True, False):
            generator = torch.Generator(DEVICE).manual_seed(3)
            cache = KVCache(model.config, 160, torch.float32, DEVICE)
            decoder = GpuDecoder(
                model, cache, lambda logits: sample(logits, *sampling, generator=generator),
                [generator], graph=graph)
            tokens = [5]
            for table in tables:
                decoder.set_thresholds(table)
                decoder.start(tokens[-1], len(tokens) - 1)
                tokens += decoder.tokens(60)
            assert tokens == expected
            counts.append(decoder.kept.tolist())
            assert counts[-1] == counts[0]  # in every way
            assert decoder.graphs is None or decoder.graphs.keys() == {False, True}
