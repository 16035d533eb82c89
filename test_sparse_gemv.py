"""The sparse GEMV against float64. The same tests run three times: on the CPU's own route here;
with the Triton code in Triton's interpreter, in a process of its own (the last test starts it);
and with the compiled kernel on a GPU."""

import os
import random
import subprocess
import sys

import numpy
import pytest
import torch
import torch.nn.functional as F
import triton

from sparse_gemv import INTERPRETED, sparse_gemv

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# Only the output's rounding is left; the interpreter cuts bfloat16 off where the hardware rounds
# to nearest.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3 if INTERPRETED else 4e-3,
    torch.int8: 1e-5,
}
SEED = random.SystemRandom().randrange(2**32)


def reference(
    x,
    w_t,
    threshold,
    *,
    ends=None,
    scale=None,
    bias=None,
    norm=None,
    swiglu=False,
    residual=None,
    kept=None,
):
    """The definition of `sparse_gemv`: the same arguments, plain PyTorch, sums in float64."""
    dtype, x = x.dtype, x.reshape(-1).double()
    if swiglu:
        gate, up = x.chunk(2)
        x = F.silu(gate) * up
    if norm is not None:
        x = F.rms_norm(x, x.shape, norm[0].double(), norm[1])
    x, y, start = x.to(dtype), [], 0
    ends = ends or (w_t.shape[1],)
    thresholds = torch.as_tensor(threshold, dtype=torch.float32, device=x.device).view(-1)
    for i, (t, end) in enumerate(zip(thresholds.expand(len(ends)), ends)):
        keep = ~(x.float().abs() <= t)
        y.append(x[keep].double() @ w_t[keep, start:end].double())
        if kept is not None:
            kept[i] += keep.sum()
        start = end
    y = torch.cat(y)
    y = y if scale is None else y * scale.double()
    y = y if bias is None else y + bias.double()
    return (y if residual is None else y + residual.double()).to(dtype)


def version(package):
    return [int(part) for part in package.__version__.split(".")[:2]]


@pytest.fixture(autouse=True)
def seed():
    print("seed", SEED)
    torch.manual_seed(SEED)


def draw(k, n, dtype):
    """x [k] and keyword arguments for w_t [k, n] of this dtype; int8 weights meet a float32 x."""
    if dtype == torch.int8:
        return (
            torch.randn(k, device=DEVICE),
            torch.randint(-127, 128, (k, n), dtype=dtype, device=DEVICE),
            {"scale": torch.rand(n, device=DEVICE) / 100},
        )
    return torch.randn(k, device=DEVICE).to(dtype), torch.randn(k, n, device=DEVICE).to(dtype), {}


def error(y, expected):
    """Relative to the size of the whole vector, or to 1 for each of its elements, if more; NaN
    never passes."""
    y, expected = y.double().view(-1), expected.double().view(-1)
    return ((y - expected).norm() / expected.norm().clamp(min=len(y) ** 0.5)).item()


def test_random_draws():
    """200 draws of sizes, types and thresholds, against float64 sums over the kept rows."""
    rng = random.Random(SEED)
    for _ in range(200):
        k, n = rng.choice([1, 7, 33, 64, 100, 256, 577]), rng.choice([1, 5, 32, 33, 64, 96])
        dtype = rng.choice(list(TOLERANCE))
        x, w_t, options = draw(k, n, dtype)
        t = (
            x.float().abs().quantile(rng.random()).item()
            if rng.random() < 0.9
            else rng.choice([-1.0, 1e9])
        )
        kept = x.float().abs() > t
        scale = options.get("scale", torch.ones(n, device=DEVICE)).double()
        expected = x[kept].double() @ w_t[kept].double() * scale
        # The size that sums of random signs have: a single output may by chance be far smaller
        # than its terms.
        size = ((x[kept].double() ** 2 @ w_t[kept].double() ** 2).sqrt() * scale).norm()
        for compute in (sparse_gemv, reference):
            off = (compute(x, w_t, t, **options).double() - expected).norm()
            assert off <= TOLERANCE[dtype] * max(size, expected.norm()), (compute, k, n, dtype, t)


@pytest.mark.parametrize(
    "k, n",
    [(576, 96), (577, 33), (1, 1)] + [(576, 960), (1536, 576), (2048, 8192)] * (not INTERPRETED),
)
def test_fused_forms(k, n):
    """RMSNorm or SwiGLU in front, scale, bias and residual behind, and segments with thresholds
    in memory."""
    for dtype in (torch.float32, torch.bfloat16):
        x, w_t, _ = draw(k, n, dtype)
        norm = torch.rand(k, device=DEVICE).to(dtype), 1e-5
        # In the widest gap between two values of the middle half, so that no rounding decides
        # what is kept.
        magnitude = F.rms_norm(x.float(), (k,), norm[0].float(), norm[1]).abs().sort().values
        gap = k // 4 + magnitude[k // 4 : k - k // 4].diff().argmax().item() if k > 1 else 0
        middle = magnitude[gap : gap + 2].mean() if k > 1 else magnitude[0] / 2
        ends = sorted({max(1, n // 3), max(1, n // 2), n})
        thresholds = torch.stack([middle * (i % 2) for i in range(len(ends))])
        kept, expected_kept = (  # not 0: rows are added to what is there
            torch.full((len(ends),), 7, device=DEVICE) for _ in range(2)
        )
        options = {"ends": ends, "norm": norm, "bias": torch.randn(n, device=DEVICE).to(dtype),
                   "scale": torch.rand(n, device=DEVICE)}
        y = sparse_gemv(x, w_t, thresholds, kept=kept, **options)
        # on the CPU each step of a fused form rounds, in the kernel only the result
        assert (
            error(y, reference(x, w_t, thresholds, kept=expected_kept, **options))
            <= 3 * TOLERANCE[dtype]
        )
        assert torch.equal(kept, expected_kept)
        gate_up, residual = (
            torch.randn(2 * k, device=DEVICE).to(dtype),
            torch.randn(n, device=DEVICE).to(dtype),
        )
        gate, up = gate_up.float().chunk(2)
        magnitude = (F.silu(gate) * up).abs().sort().values
        gap = k // 4 + magnitude[k // 4 : k - k // 4].diff().argmax().item() if k > 1 else 0
        middle = magnitude[gap : gap + 2].mean().item() if k > 1 else magnitude.item() / 2
        options = {"swiglu": True, "residual": residual, "scale": torch.rand(n, device=DEVICE)}
        expected = reference(gate_up, w_t, middle, **options)
        y = sparse_gemv(
            gate_up, w_t, middle, out=residual, **options
        )  # in place, as the residual stream is
        assert y is residual
        assert error(y, expected) <= 5 * TOLERANCE[dtype]


def test_ties_are_dropped_and_nothing_else():
    x = torch.tensor([1.0, -1.0, 1.0000001, 0.5, -2.0, 1e-40, 0.0], device=DEVICE)
    w_t = torch.eye(7, device=DEVICE)
    assert sparse_gemv(x, w_t, 1.0).tolist() == [0, 0, x[2].item(), 0, -2, 0, 0]
    assert sparse_gemv(x, w_t, 0.0).tolist() == x.tolist()
    assert sparse_gemv(x, w_t, -1.0).tolist() == x.tolist()
    # The threshold is a float32: rounded to bfloat16, 0.3 would be 0.30078125 and drop this entry.
    assert (
        sparse_gemv(
            torch.tensor([0.30078125], device=DEVICE).bfloat16(), w_t[:1, :1].bfloat16(), 0.3
        ).item()
        != 0
    )


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize(
    "thresholds", [(0.5, 0.5, 0.5), (0.5, 0.9, 0.5), (-1.0, 0.5, 0.5), (-1.0, -1.0, -1.0)]
)
def test_segments(thresholds, n_threads):
    """Equal and other thresholds of matrices side by side, however many threads the CPU's columns
    are cut for."""
    x, w_t, _ = draw(100, 160, torch.float32)
    ends, before = (96, 128, 160), torch.get_num_threads()
    kept, expected_kept = (torch.zeros(3, dtype=torch.int64, device=DEVICE) for _ in range(2))
    torch.set_num_threads(n_threads)
    try:
        y = sparse_gemv(x, w_t, list(thresholds), ends=ends, kept=kept)
    finally:
        torch.set_num_threads(before)
    expected = reference(x, w_t, thresholds, ends=ends, kept=expected_kept)
    assert error(y, expected) <= 1e-6
    assert torch.equal(kept, expected_kept)


def test_all_and_none_dropped():
    x, w_t, _ = draw(100, 33, torch.float32)
    bias = torch.randn(33, device=DEVICE)
    assert torch.equal(sparse_gemv(x, w_t, 1e9), torch.zeros(33, device=DEVICE))
    assert torch.equal(sparse_gemv(x, w_t, float("inf"), bias=bias), bias)
    assert error(sparse_gemv(x, w_t, -1.0), x.double() @ w_t.double()) <= 1e-6


def test_nan_and_infinity():
    """Kept ones spread as in dense arithmetic; weights of dropped rows are never read."""
    x, w_t, _ = draw(64, 32, torch.float32)
    x[:32] = x[:32].sign() * 0.1
    x[32:] = x[32:].sign() * 2
    clean = sparse_gemv(x, w_t, 1.0)
    w_t[:32] = float("nan")
    assert torch.equal(sparse_gemv(x, w_t, 1.0), clean)
    x[5] = float("nan")  # not (|nan| <= t): kept
    assert sparse_gemv(x, w_t, 1.0).isnan().all()
    x[5], x[40], w_t[40] = 0.1, float("inf"), 1.0
    assert (sparse_gemv(x, w_t, 1.0) == float("inf")).all()
    assert torch.equal(sparse_gemv(x, w_t, float("inf")), torch.zeros(32, device=DEVICE))
    x[40], w_t[32:], w_t[63] = 2.0, 1.0, float("inf")  # the last row that is kept
    x[63] = 2.0
    assert (sparse_gemv(x, w_t, 1.0) == float("inf")).all()


def test_same_bits_every_time():
    for dtype in (torch.float32, torch.bfloat16):
        x, w_t, _ = draw(1000, 96, dtype)  # K is split here
        first = sparse_gemv(x, w_t, 0.5)
        assert all(torch.equal(sparse_gemv(x, w_t, 0.5), first) for _ in range(5))


def test_shapes_and_out():
    x, w_t, _ = draw(64, 48, torch.float32)
    y = sparse_gemv(x, w_t, 0.5)
    assert sparse_gemv(x[None], w_t, 0.5).shape == (1, 48) and sparse_gemv(
        x[None, None], w_t, 0.5
    ).shape == (1, 1, 48)
    out = torch.full((1, 48), float("nan"), device=DEVICE)
    assert sparse_gemv(
        x, w_t, torch.tensor([0.5], device=DEVICE), out=out
    ) is out and torch.equal(out[0], y)


@pytest.mark.parametrize(
    "name, change",
    [
        ("x is of shape", {"x": torch.zeros(63)}),
        ("x is", {"x": torch.zeros(2, 64)}),
        ("x is torch.float64", {"x": torch.zeros(64, dtype=torch.float64)}),
        ("w_t", {"w_t": torch.zeros(48, 64).T}),
        ("w_t", {"w_t": torch.zeros(64, 2, 48)}),
        ("w_t is torch.float16", {"w_t": torch.zeros(64, 48, dtype=torch.float16)}),
        ("scale", {"w_t": torch.zeros(64, 48, dtype=torch.int8)}),
        ("scale", {"scale": torch.zeros(47)}),
        ("bias", {"bias": torch.zeros(24, 2).T}),
        ("norm is", {"norm": (torch.zeros(48), 1e-5)}),
        ("x is of shape", {"swiglu": True}),
        ("norm", {"x": torch.zeros(128), "swiglu": True, "norm": (torch.zeros(64), 1e-5)}),
        ("residual", {"residual": torch.zeros(24)}),
        ("out", {"out": torch.zeros(64)}),
        ("kept", {"kept": torch.zeros(2, dtype=torch.int64)}),
        ("ends", {"ends": (24, 47)}),
        ("ends", {"ends": (24, 24, 48)}),
        ("ends", {"ends": (12, 24, 36, 48)}),
        ("threshold", {"threshold": [0.5], "ends": (24, 48)}),
        ("threshold", {"threshold": torch.zeros(2)}),
        ("threshold", {"threshold": torch.zeros(1, dtype=torch.float64)}),
    ],
)
def test_bad_input_is_named(name, change):
    arguments = {"x": torch.zeros(64), "w_t": torch.zeros(64, 48), "threshold": 0.5} | change
    arguments = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }
    if "norm" in change:
        arguments["norm"] = change["norm"][0].to(DEVICE), 1e-5
    with pytest.raises(ValueError, match=name):
        sparse_gemv(**arguments)


@pytest.mark.skipif(
    INTERPRETED or DEVICE == "cuda", reason="this is the process it starts, or a GPU ran the code"
)
@pytest.mark.skipif(
    version(triton) < [3, 7] and version(numpy) >= [2, 4],
    reason="this Triton's interpreter fails with this NumPy on loops up to a number from memory",
)
def test_triton_code_in_the_interpreter():
    """The kernels' own code, on the CPU."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "test_sparse_gemv.py",
        "test_decode.py",
        "gpu/test_head_gemv.py",
    ]
    done = subprocess.run(
        command,
        cwd=here,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
