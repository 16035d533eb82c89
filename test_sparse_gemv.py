"""The sparse product against float64. The same tests run three times: on the CPU's own route here;
with the Triton code in Triton's interpreter, in a process of its own (the last test starts one
for every file of kernels); and with the compiled kernels on a GPU."""

import os
import random
import runpy
import subprocess
import sys

import numpy
import pytest
import torch
import triton

from conftest import DEVICE, HERE, KERNELS, TOLERANCE, error, needs_kernels, reference
from sparse_gemv import INTERPRETED, definition, naive_gemv, sparse_gemv

pytestmark = pytest.mark.usefixtures("seed", "poisoned")


def draw(k, n, dtype):
    """x [k] and keyword arguments for w_t [k, n] of this dtype; int8 weights meet a float32 x."""
    if dtype == torch.int8:
        return (torch.randn(k, device=DEVICE),
                torch.randint(-127, 128, (k, n), dtype=dtype, device=DEVICE),
                {"scale": torch.rand(n, device=DEVICE) / 100})
    return torch.randn(k, device=DEVICE).to(dtype), torch.randn(k, n, device=DEVICE).to(dtype), {}


def product(x, w_t, threshold, **options):
    """`sparse_gemv` into an `out` of NaN."""
    out = torch.full(w_t.shape[1:], float("nan"), dtype=x.dtype, device=DEVICE)
    assert sparse_gemv(x, w_t, threshold, out=out, **options) is out
    return out


def test_random_draws(seed, monkeypatch):
    """Of sizes, types and thresholds, against the reference, and the same bits twice; the
    definition in plain PyTorch and the naive kernel, too."""
    rng = random.Random(seed)
    # by which a CPU cuts columns
    monkeypatch.setattr(torch, "get_num_threads", lambda: rng.choice([1, 2, 5]))
    for _ in range(15 if INTERPRETED else 100):
        k, n = rng.choice([1, 7, 33, 64, 100, 301]), rng.choice([5, 32, 33, 64, 100])
        dtype = rng.choice([*TOLERANCE, torch.int8])
        x, w_t, options = draw(k, n, dtype)
        t = rng.choice([*x.float().abs().tolist()[:9], -1.0, 1e9])
        if rng.random() < 0.3:
            options["bias"] = torch.randn(n, device=DEVICE).to(x.dtype)
        expected = reference(x, w_t, t, **options)
        outs = [product(x, w_t, t, **options), product(x, w_t, t, **options)]
        assert torch.equal(*outs), (k, n, dtype, t)
        if not options:
            outs.append(definition(x.float(), w_t.float(), t))
            if KERNELS:
                outs.append(naive_gemv(x, w_t, t))
        for y in outs:
            assert error(y, expected) <= 3 * TOLERANCE.get(dtype, 1e-5), (k, n, dtype, t)


def test_ties_are_dropped_and_nothing_else():
    x = torch.tensor([1.0, -1.0, 1.0000001, 0.5, -2.0, 1e-40, 0.0], device=DEVICE)
    w_t = torch.eye(7, device=DEVICE)
    assert product(x, w_t, 1.0).tolist() == [0, 0, x[2].item(), 0, -2, 0, 0]
    assert product(x, w_t, 0.0).tolist() == x.tolist()
    assert product(x, w_t, -1.0).tolist() == x.tolist()
    # The threshold is a float32: rounded to bfloat16, 0.3 would be 0.30078125 and drop this entry.
    x = torch.tensor([0.30078125], device=DEVICE).bfloat16()
    assert product(x, w_t[:1, :1].bfloat16(), 0.3).item() != 0


@pytest.mark.parametrize("compute", [product, pytest.param(naive_gemv, marks=needs_kernels)])
def test_nan_and_infinity(compute):
    """Kept ones spread as in dense arithmetic; weights of dropped rows are never read."""
    x, w_t, _ = draw(64, 32, torch.float32)
    x[:32] = x[:32].sign() * 0.1
    x[32:] = x[32:].sign() * 2
    clean = compute(x, w_t, 1.0)
    w_t[:32] = float("nan")
    assert torch.equal(compute(x, w_t, 1.0), clean)
    x[5] = float("nan")  # not (|nan| <= t): kept
    assert compute(x, w_t, 1.0).isnan().all()
    x[5], x[40], w_t[40] = 0.1, float("inf"), 1.0
    assert (compute(x, w_t, 1.0) == float("inf")).all()
    assert torch.equal(compute(x, w_t, float("inf")), torch.zeros(32, device=DEVICE))
    x[40], w_t[32:], w_t[63] = 2.0, 1.0, float("inf")  # the last row that is kept
    x[63] = 2.0
    assert (compute(x, w_t, 1.0) == float("inf")).all()


def test_rows_beyond_2_to_the_31_weights():
    """Their offsets need 64 bits. Only the rows that are kept touch their 2 GB."""
    k, n = 2**24, 136
    w_t = torch.from_numpy(numpy.zeros((k, n), dtype="int8")).to(DEVICE)  # needs no memory yet
    x = torch.zeros(k, device=DEVICE)
    for row, value in (5, 2.0), (k - 1, 3.0):
        x[row], w_t[row] = value, torch.arange(n) - row % 50
    expected = sum(x[row] * w_t[row] for row in (5, k - 1))
    y = product(x, w_t, 0.5, scale=torch.ones(n, device=DEVICE))
    assert torch.equal(y, expected)


def test_shapes_and_out():
    x, w_t, _ = draw(64, 48, torch.float32)
    threshold = torch.tensor([0.5], device=DEVICE)
    y = product(x, w_t, threshold)
    for shape in ((64,), (1, 64), (1, 1, 64)):
        assert torch.equal(sparse_gemv(x.view(shape), w_t, 0.5), y.view(*shape[:-1], 48))
    for out in (torch.empty(48, device=DEVICE), torch.empty(1, 48, device=DEVICE)):
        assert sparse_gemv(x[None], w_t, threshold, out=out.fill_(float("nan"))) is out
        assert torch.equal(out.view(-1), y)


@pytest.mark.parametrize("name, change", [
    ("x is of shape", {"x": torch.zeros(63)}),
    ("x is", {"x": torch.zeros(2, 64)}),
    ("x is torch.float64", {"x": torch.zeros(64, dtype=torch.float64)}),
    ("w_t", {"w_t": torch.zeros(48, 64).T}),
    ("w_t", {"w_t": torch.zeros(64, 2, 48)}),
    ("w_t is torch.float16", {"w_t": torch.zeros(64, 48, dtype=torch.float16)}),
    ("scale", {"w_t": torch.zeros(64, 48, dtype=torch.int8)}),
    ("scale", {"scale": torch.zeros(47)}),
    ("bias", {"bias": torch.zeros(24, 2).T}),
    ("out", {"out": torch.zeros(64)}),
    ("threshold", {"threshold": torch.zeros(2)}),
    ("threshold", {"threshold": torch.zeros(1, dtype=torch.float64)}),
])
def test_bad_input_is_named(name, change):
    arguments = {"x": torch.zeros(64), "w_t": torch.zeros(64, 48), "threshold": 0.5} | change
    arguments = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
                 for key, value in arguments.items()}
    with pytest.raises(ValueError, match=name):
        sparse_gemv(**arguments)


@pytest.mark.skipif(KERNELS, reason="a CPU's own way")
def test_a_cpu_needs_no_triton(monkeypatch):
    """The file alone, where Triton cannot be imported, as on macOS."""
    monkeypatch.setitem(sys.modules, "triton", None)
    alone = runpy.run_path(HERE / "sparse_gemv.py")
    x, w_t, _ = draw(8, 6, torch.float32)
    assert torch.equal(alone["sparse_gemv"](x, w_t, 0.5), sparse_gemv(x, w_t, 0.5))


def version(package):
    return [int(part) for part in package.__version__.split(".")[:2]]


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda",
                    reason="this is the process it starts, or a GPU ran the code")
@pytest.mark.skipif(
    version(triton) < [3, 7] and version(numpy) >= [2, 4],
    reason="this Triton's interpreter fails with this NumPy on loops up to a number from memory")
@pytest.mark.parametrize("files", ["gpu/test_head.py gpu/test_products.py",
                                   "gpu/test_kernels.py test_decode.py test_sparse_gemv.py"])
def test_triton_code_in_the_interpreter(files):
    """The kernels' own code, on the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         *files.split()],
        cwd=HERE, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
