"""Every product of a decode step on a GPU against the one reference: on a GPU, or in Triton's
interpreter, which test_sparse_gemv.py starts."""

import random

import pytest
import torch
import torch.nn.functional as F

from conftest import DEVICE, TOLERANCE, error, needs_kernels, reference
from gpu import product as choice
from gpu.four_bits import product_of_four_bits
from gpu.lists import product_by_lists
from gpu.one_kernel import product_in_one_kernel
from gpu.tensor_cores import product_on_tensor_cores, split_rows
from quantize import dequantize, quantize_int4, split_groups

pytestmark = pytest.mark.usefixtures("seed", "poisoned")
FLOATS = torch.float32, torch.float16, torch.bfloat16


def on_tensor_cores(x, w_t, thresholds, out, **options):
    return product_on_tensor_cores(x, w_t, out, **options)


# name: function, dtypes of x, ends must be multiples of (for every row, for some; 0: not at all),
# how many times TOLERANCE its sums may be off
KINDS = {
    "lists": (product_by_lists, FLOATS, 1, 1, 1),
    "int8": (product_by_lists, FLOATS, 1, 1, 10),
    "one kernel": (product_in_one_kernel, FLOATS, 1, 64, 1),
    "tensor cores": (on_tensor_cores, [torch.bfloat16], 1, 0, 2.5),
    "4 bits": (product_of_four_bits, FLOATS, 32, 32, 4),
}
ENDS = [(64,), (64, 192, 256), (128, 192), (32, 96), (32,), (160,), (33, 70), (5,), (80,)]


def leveled(k):
    """Numbers around 1, 2, 3 and 4 of random sign: no rounding moves one past 1.5, 2.5 or 3.5."""
    signs = torch.randint(0, 2, (k,)) * 2 - 1
    return (signs * torch.randint(1, 5, (k,)) * (1 + 0.1 * torch.rand(k))).to(DEVICE)


def random_weights(k, n, kind, dtype):
    """Weights as the product takes them, floats [K, N] as the reference does, scale's option."""
    w = torch.randn(k, n, device=DEVICE)
    if kind == "4 bits":
        w_t, scale = (part.contiguous() for part in split_groups(quantize_int4(w.T)))
        return w_t, dequantize(w_t, scale), {"scale": scale}
    if kind == "int8":
        w_t = torch.randint(-128, 128, (k, n), dtype=torch.int8, device=DEVICE)
        scale = torch.rand(n, device=DEVICE) / 100
        return w_t, w_t * scale, {"scale": scale}
    return (w_t := w.to(dtype)), w_t, {}


def draw(rng, kind, k, ends, dtype, form, sparse):
    """Arguments of a product, its weights as the reference takes them, options, and scale's option.

    Values of x lie on both sides of thresholds. What a dropped row could add is NaN or infinite.
    """
    x, options = leveled(k), {"ends": ends}
    thresholds = torch.tensor([rng.choice([-1.0, 1.5, 2.5, 3.5, 9.0]) for _ in ends]).to(DEVICE)
    # x and weights are rounded later: still no value is within 3% of a threshold
    inputs = x
    if form == "swiglu":
        gate = 1 + torch.rand(k, device=DEVICE)
        x, options["swiglu"] = torch.cat((gate, x / F.silu(gate))), True
    if form == "norm":
        x = x * rng.choice([1, 1 / 300])  # eps matters for the small ones
        weight = torch.randn(k, device=DEVICE).sign() * (1 + 0.02 * torch.rand(k, device=DEVICE))
        options["norm"] = weight.to(dtype), 1e-5
        thresholds /= inputs.norm()
        inputs = F.rms_norm(x, (k,), weight, 1e-5)
        thresholds *= inputs.norm()
    w_t, w, scale = random_weights(k, ends[-1], kind, dtype)
    for t, start, end in zip(thresholds, (0, *ends), ends) if sparse else ():
        dropped = (inputs.abs() <= t).nonzero().view(-1)
        if kind == "4 bits":
            scale["scale"][dropped, start // 32:end // 32] = float("nan")
        elif kind != "int8":
            w_t[dropped, start:end] = float("nan")
            w_t[dropped[::2], start:end] = float("inf")
    for name in ("bias", "residual"):
        if rng.random() < 0.5:
            options[name] = torch.randn(ends[-1], device=DEVICE).to(dtype)
    return (x.to(dtype), w_t, thresholds if sparse else None), w, options, scale


@needs_kernels
@pytest.mark.parametrize("form", ["plain", "norm", "swiglu"])
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, form, seed):
    """Any number of rows, one split and many, up to three matrices with thresholds of their own.
    Dropped rows are never read; `out` may be the residual; the same bits twice."""
    rng = random.Random(seed)
    compute, dtypes, *multiples, factor = KINDS[kind]
    sizes = [(k, ends) for k in (1, 33, 64, 130, 300) for ends in ENDS]
    for sparse, multiple in enumerate(multiples):
        fitting = [size for size in sizes if multiple and not any(e % multiple for e in size[1])]
        for k, ends in (rng.choice(fitting), (450, (64, 128, 192))) if fitting else ():
            dtype = rng.choice(dtypes)
            arguments, w, options, scale = draw(rng, kind, k, ends, dtype, form, sparse)
            counts = [torch.full((len(ends),), 7, device=DEVICE) for _ in range(3)]
            expected = reference(arguments[0], w, arguments[2], kept=counts[0], **options)
            outs = []
            for kept in counts[1:]:
                out = torch.full((ends[-1],), float("nan"), dtype=dtype, device=DEVICE)
                mine = options
                if "residual" in options and rng.random() < 0.5:  # in place
                    out = options["residual"].clone()
                    mine = options | {"residual": out}
                compute(*arguments, out, kept=kept, **mine, **scale)
                outs.append(out)
            case = seed, k, ends, sparse, dtype
            tolerance = TOLERANCE[dtype] * factor * (1 if form == "plain" else 2)
            assert error(outs[0], expected) <= tolerance, case
            assert torch.equal(*outs), case
            assert all(torch.equal(count, counts[0]) for count in counts), case
        if not sparse:  # where every row is read, a NaN stays visible
            arguments[0][k // 2] = float("nan")
            assert compute(*arguments, out, **options, **scale).isnan().all(), case


@needs_kernels
@pytest.mark.parametrize("kind", ["lists", "one kernel"])
def test_nan_and_infinity_spread(kind):
    """As in dense arithmetic where they are kept, and not at all where they are dropped."""
    x, w_t = leveled(200), torch.rand(200, 128, device=DEVICE) + 1
    thresholds = torch.tensor([1.5, 2.5], device=DEVICE)

    def compute():
        out = torch.full((128,), float("nan"), device=DEVICE)
        return KINDS[kind][0](x, w_t, thresholds, out, ends=(64, 128))

    x[9], w_t[9, :64], w_t[9, 64:] = 1.5, float("nan"), 1.0  # a tie is dropped
    x[150], w_t[150] = 2.0, float("inf")  # kept by the first matrix only
    out = compute()
    assert (out[:64] == float("inf")).all() and out[64:].isfinite().all()
    x[150] = float("-inf")
    assert (compute() == -float("inf")).all()
    thresholds[1] = float("inf")  # |x| <= infinity is dropped
    out = compute()
    assert (out[:64] == -float("inf")).all() and (out[64:] == 0).all()
    x[150] = float("nan")  # not (|nan| <= t): kept
    assert compute().isnan().all()


# ---- choices -----------------------------------------------------------------------------------

B16 = torch.bfloat16


@pytest.mark.parametrize("dtype, k, ends, dense, sparse", [
    # of Llama-3.2-1B, Llama-3-8B, Llama-2-7B
    (B16, 2048, (2048, 2560, 3072), "in_one_kernel", "in_one_kernel"),
    (B16, 2048, (8192, 16384), "in_one_kernel", "by_lists"),
    (B16, 8192, (2048,), "in_one_kernel", "by_lists"),
    (B16, 4096, (4096, 5120, 6144), "on_tensor_cores", "in_one_kernel"),
    (B16, 4096, (4096, 8192, 12288), "on_tensor_cores", "by_lists"),
    (B16, 2112, (2112,), "on_tensor_cores", "in_one_kernel"),
    (B16, 2112, (2080,), "on_tensor_cores", "by_lists"),  # a tile within one matrix
    (B16, 2048, (2000, 2048), "in_one_kernel", "by_lists"),
    (B16, 6144, (64,), "in_one_kernel", "in_one_kernel"),  # six tiles of 64 rows a program
    (B16, 6208, (64,), "in_one_kernel", "by_lists"),  # seven
    (torch.float32, 2112, (2112,), "in_one_kernel", "in_one_kernel"),
    (torch.int8, 64, (64,), "by_lists", "by_lists"),
    (torch.uint8, 64, (64,), "of_four_bits", "of_four_bits")])
def test_which_kernel(dtype, k, ends, dense, sparse, monkeypatch):
    """`product` passes everything on; with thresholds, to a kernel that takes them."""
    calls = []
    for name in ("by_lists", "in_one_kernel", "on_tensor_cores", "of_four_bits"):
        monkeypatch.setattr(choice, f"product_{name}",
                            lambda *a, name=name, **o: calls.append((name, a, o)))
    x = torch.empty(k, dtype=B16 if dtype.itemsize == 1 else dtype)
    w_t, out = torch.empty(k, ends[-1], dtype=dtype, device="meta"), torch.empty(ends[-1])
    thresholds, scale = torch.zeros(len(ends)), out if dtype.itemsize == 1 else None
    choice.product(x, w_t, None, out, ends=ends, scale=scale)
    choice.product(x, w_t, thresholds, out, ends=ends, scale=scale)
    assert [name for name, _, _ in calls] == [dense, sparse]
    for _, arguments, options in calls:
        assert options["ends"] is ends and options.get("scale") is scale
        assert arguments[:2] == (x, w_t) and arguments[-1] is out
    assert calls[1][1][2] is thresholds


def test_every_program_on_tensor_cores_has_rows():
    """One without would never wait for the kernel before, and finish before it."""
    for k in (1, 64, 65, *range(129, 20000, 37)):
        for tiles in (1, 9, 33, 528, 2000):
            chunk, splits = split_rows(k, tiles, 64, 528, 32)
            assert chunk % 64 == 0 and (splits - 1) * chunk < k <= splits * chunk, (k, tiles)
            assert splits == 1 or splits * tiles <= 528, (k, tiles)
