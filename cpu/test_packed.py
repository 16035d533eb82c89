"""Tests of few-bit weights on a CPU: the layout against gguf's own numbers, and the step in C
against the product of the numbers that they stand for."""

import gguf
import numpy as np
import pytest
import torch

import checkpoint
from checkpoint.conftest import write_gguf
from checkpoint.gguf_file import GROUPED, groups_of, to_float
from cli.accounting import block_bytes, other_bytes, tensors
from cpu import compiler
from cpu.matrix import pieces
from cpu.packed import Packed, PackedLinear
from cpu.step import CStep
from generate import generate_tokens
from model import Config, KVCache, Model
from session import Session

torch.set_num_threads(1)  # tiny products: a second thread would only wait
try:
    compiler.library()
except compiler.NoCompiler as error:
    pytest.skip(str(error), allow_module_level=True)


def random_tensor(name, n, k, seed=0, size=1e-2):
    """Random blocks of a type -> (float32 [n, k] as gguf has it, Groups). Scales are negative too;
    one group of them is zero."""
    kind = gguf.GGMLQuantizationType[name]
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    raw = draw.integers(0, 256, (n, k // block, n_bytes), np.uint8)
    for at in (208,) if name == "Q6_K" else (0, 2)[:1 + (name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"))]:
        numbers = draw.standard_normal((n, k // block, 1)) * size
        numbers[n // 2, 0] = 0
        raw[..., at:at + 2] = numbers.astype(np.float16).view(np.uint8)
    raw = raw.reshape(n, -1)
    return to_float((n, k), kind, raw), groups_of(kind, raw)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("n, size", [(1, 1e-2), (70, 1e3), (3900, 1e-6)])
def test_the_numbers_are_those_of_gguf(name, n, size, monkeypatch):
    """Exactly, but for scales that are products: they have 11 bits. Sizes: beyond float16 for
    products, and a denormal float16; more columns than C unpacks at a time."""
    monkeypatch.setattr("cpu.packed.PIECE", 70 * 512)  # several pieces
    weight, groups = random_tensor(name, n, 512, size=size)
    packed = Packed(weight, groups)
    error = (packed.weight().T - weight).abs()
    assert error.max() <= (2**-11 if name.endswith("K") else 2**-24) * weight.abs().max()
    rows = torch.tensor([0, n - 1, n // 2])
    assert torch.equal(packed[rows], packed.weight().T[rows])
    # Prefill multiplies pieces.
    linear = PackedLinear(0, "gate_up", 512, (n, n), False, torch.float32, "cpu")
    linear.parts, x = [packed, packed], torch.randn(3, 512, requires_grad=True)
    assert torch.equal(torch.cat(list(pieces(linear)), 1), linear.w_t)
    assert torch.equal(linear.w_t, torch.cat([packed.weight()] * 2, 1))
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad[0], linear.w_t.sum(1), rtol=1e-4, atol=1e-7)
    # Where the columns are many, the memory is the file's and little more.
    kind = gguf.GGMLQuantizationType[name]
    file = n * 512 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
    memory = sum(tensor.nbytes for tensor in tensors(packed)) * n / packed.columns
    assert file * 0.99 <= memory <= file * 1.16


CONFIG = Config(131, 512, 256, 2, 8, 2, 32, context=40, qkv_bias=True)


def random_model(config=CONFIG):
    """A model whose matrices have all types side by side."""
    packed, seed = Model(config, linear_class=PackedLinear), 0
    for linear in [*packed.linears(), packed.lm_head]:
        for i, width in enumerate(linear.widths):
            weight, groups = random_tensor([*GROUPED][seed % 8], width, linear.in_features, seed)
            scale, seed = 0.5 / weight.std() / linear.in_features ** 0.5, seed + 1
            for name in ("scale", "minimum"):
                if (numbers := getattr(groups, name)) is not None:
                    numbers *= scale
            linear.load_weight(i, weight * scale, groups)
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(linear.bias.shape) / 4)
    for block in packed.blocks:
        for norm in (block.attn_norm, block.mlp_norm):
            norm.copy_(1 + torch.rand(norm.shape) / 4)
    packed.norm.fill_(1)
    weight, groups = random_tensor("Q5_0", config.vocab_size, config.hidden_size)
    groups.scale *= 8
    packed.embedding = (packed.lm_head.parts[0] if config.tie_embeddings
                        else Packed(weight * 8, groups))
    return packed


def rounded(x, part, kept=None):
    """x [K] as step.c rounds it for a `Packed` where it keeps the indices `kept`, all by default,
    and the step of each."""
    kept = torch.arange(len(x)) if kept is None else kept
    group = torch.zeros(len(x) // part.group, dtype=torch.float64)
    count = group.index_add(0, kept // part.group, torch.ones(len(kept), dtype=torch.float64))
    total = group.index_add(0, kept // part.group, x[kept].double().abs())
    largest = {4: 15, 5: 31, 6: 63, 8: 15}[part.bits]
    steps = (total / (65535 // largest - count // 2)).repeat_interleave(part.group)
    left = torch.zeros(len(x), dtype=torch.float64).index_copy(0, kept, x[kept].double())
    return (left / steps.clamp(min=1e-30)).round() * steps, steps


@pytest.mark.parametrize("n_shares, row_shares, tied", [(1, 1, True), (2, 2, False), (6, 3, True)])
def test_a_step_in_c(n_shares, row_shares, tied):
    """Dense and with thresholds, against products in float64 that round x as C does: of up to four
    shares each rounds the rows that it reads. Which rows are kept is decided before."""
    config = Config(**{**vars(CONFIG), "tie_embeddings": tied})
    model, shape = random_model(config), (2, 7)
    for thresholds in (torch.full(shape, -1.0), torch.rand(shape) * 0.8):
        kept, wanted_kept = torch.zeros(2, *shape, dtype=torch.int64)
        run = CStep(model, KVCache(config, 40), thresholds, kept, n_shares)
        errors = []

        def product(x, part, threshold):
            rows = (~(x.abs() <= threshold)).nonzero()[:, 0]
            cuts = [len(rows) * r // row_shares for r in range(row_shares + 1)]
            x = sum(rounded(x, part, rows[i:j])[0] for i, j in zip(cuts, cuts[1:]))
            return x @ part.weight().double(), len(rows)

        def project(x, linear):
            y = []
            for i, (part, place) in enumerate(zip(linear.parts, range(7)[linear.places])):
                product_i, n = product(x[0], part, thresholds[linear.layer, place])
                wanted_kept[linear.layer, place] += n
                y.append(product_i)
            y = torch.cat(y)[None].float()
            return y if linear.bias is None else y + linear.bias

        for token in range(0, 130, 16):
            found = run(token, 0)
            hidden = model.forward(torch.tensor([token]), KVCache(config, 1), project)[0]
            wanted, _ = product(hidden, model.lm_head.parts[0], -1)
            errors.append(((found - wanted).norm() / wanted.norm()).item())
        # Now and then an x is so near to a tie or to its threshold that it falls to the other side.
        assert sorted(errors)[len(errors) // 2] <= 1e-3, errors
        assert (kept - wanted_kept).abs().max() <= 20


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("sparsity", [0, 0.9])
def test_rounding_x_is_the_only_rounding(name, sparsity):
    """A product in C against float64 with x rounded as documented, and within the bound of x."""
    config = Config(300, 512, 64, 1, 1, 1, 512, context=2, tie_embeddings=True)
    model = Model(config, linear_class=PackedLinear)
    for linear in model.linears():
        for i, width in enumerate(linear.widths):
            linear.load_weight(i, *random_tensor("Q4_0", width, linear.in_features, size=0))
    for norm in (model.norm, model.blocks[0].attn_norm, model.blocks[0].mlp_norm):
        norm.fill_(1)
    weight, groups = random_tensor(name, 300, 512)
    model.lm_head.load_weight(0, weight, groups)
    model.embedding = model.lm_head.parts[0]
    model.norm.copy_(torch.randn(512) * (torch.rand(512) >= sparsity))
    kept = torch.zeros(1, 7, dtype=torch.int64)
    run = CStep(model, KVCache(config, 2), torch.full((1, 7), -1.0), kept, 1)
    part = model.lm_head.parts[0]
    w = part.weight().double()
    for token in range(3):
        x = model.forward(torch.tensor([token]))[0]
        found, (x_rounded, steps) = run(token, 0).double(), rounded(x, part)
        size = x_rounded.abs() @ w.abs()
        # A tie may be rounded the other way: one step of one x.
        tie = 1.01 * (steps[:, None] * w.abs()).amax(0)
        assert ((found - x_rounded @ w).abs() <= 1e-5 * size + tie).all()
        bound = (steps / 2) @ w.abs()
        assert ((found - x.double() @ w).abs() <= bound + 1e-5 * size).all()


def test_numbers_that_are_no_numbers():
    model, kept = random_model(), torch.zeros(2, 7, dtype=torch.int64)
    for value in (1.0, torch.nan, torch.inf):
        model.blocks[1].mlp_norm[7] = value
        run = CStep(model, KVCache(CONFIG, 40), torch.full((2, 7), -1.0), kept, 2)
        assert run(3, 0).isfinite().all() if value == 1 else run(3, 0).isnan().all()


@pytest.mark.parametrize("quant, dtype", [("Q4_0", torch.float32), ("Q4_1", torch.bfloat16),
                                          ("Q5_0", torch.bfloat16), ("Q8_0", torch.float32)])
def test_a_gguf_file_runs_as_it_is(tmp_path, quant, dtype, monkeypatch):
    """Prefill and steps; every byte that the model holds is counted."""
    file = write_gguf(tmp_path / "m.gguf", quant=gguf.GGMLQuantizationType[quant])
    model, _ = checkpoint.load(file, dtype=dtype, quantize="gguf")
    plain, _ = checkpoint.load(file, dtype=dtype)
    assert {type(linear) for linear in model.linears()} == {PackedLinear}
    assert model.digest == plain.digest
    tokens = torch.arange(30) * 7
    for first, second in zip(model.linears(), plain.linears()):
        assert torch.equal(first.w_t, second.w_t)
    exact, _ = checkpoint.load(file)
    found, wanted = (m.logits(m.forward(tokens)).float() for m in (model, exact))
    close = 1e-5 if dtype == torch.float32 else 0.15  # of activations in bfloat16
    assert (found - wanted).norm() <= close * wanted.norm()
    session = Session(model, torch.full((2, 7), 0.02))
    ids = list(session.generate(tokens.tolist(), 12))
    assert len(ids) == 12 and 0 < session.sparsity() < 1
    assert ids == list(generate_tokens(model, tokens.tolist(), 12, stop=(),
                                       thresholds=torch.full((2, 7), 0.02)))
    held = [*model.linears(), model.lm_head, *model.blocks]
    total = sum(tensor.nbytes for thing in held for tensor in tensors(thing)) + model.norm.nbytes
    assert block_bytes(model) + other_bytes(model) == pytest.approx(total + 32 * dtype.itemsize)
    monkeypatch.setattr(checkpoint.memory, "free_memory", lambda device: file.stat().st_size)
    with pytest.raises(ValueError, match="the model in gguf needs"):
        checkpoint.load(file, dtype=dtype, quantize="gguf")
