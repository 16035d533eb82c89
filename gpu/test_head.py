"""The LM head with bounds against the whole LM head: on a GPU, or in Triton's interpreter, which
test_sparse_gemv.py starts; its mathematics against float64."""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from conftest import DEVICE, needs_kernels
from gpu import head
from gpu.head import Head
from gpu.token_kernels import likeliest
from lm_head import bounds, can_certify, certify, likely_rows, limits, logits_needed
from model import Linear, rms_norm
from sampling import penalize
from sparse_gemv import INTERPRETED

NAN, INF = float("nan"), float("inf")


pytestmark = pytest.mark.usefixtures("seed")


def scaled_rows(w, x, low, high):
    w *= 10 ** (torch.rand(len(w), 1) * (high - low) + low)


def near_ties(w, x):
    """Many rows close to the best, by less than any bound tells, and two that are equal."""
    best = (w @ x).argmax()
    w[::3] = w[best] * (1 + 1e-6 * torch.randn(len(w[::3]), 1))
    w[7] = w[-2]


def close_to_the_end(w, x):
    """The largest logit is beyond float16, the others far below."""
    w[5] = x / x.norm() ** 2 * 70000


CASES = {  # changes W [V, K] and x [K] in place; whether the largest logits are finite
    "random": (lambda w, x: None, True),
    "near ties": (near_ties, True),
    "all rows equal": (lambda w, x: w.copy_(w[3].clone()), True),
    "a row of zeros": (lambda w, x: w[11].zero_(), True),
    "zeros": (lambda w, x: w.zero_(), True),
    "negative logits": (lambda w, x: w.copy_(-x + 0.1 * w), True),
    "rows of all sizes": (lambda w, x: scaled_rows(w, x, -3, 2), True),
    "huge and tiny rows": (lambda w, x: scaled_rows(w, x, -44, 36), None),
    "tiny rows": (lambda w, x: scaled_rows(w, x, -44, -38), True),
    "an outlier in x": (lambda w, x: x[3].fill_(1000.0), True),
    "an outlier in W": (lambda w, x: w[9, 3].fill_(1000.0), True),
    "x is zero": (lambda w, x: x.zero_(), True),
    "NaN in W": (lambda w, x: w[2, 5].fill_(NAN), False),
    "infinity in W": (lambda w, x: w[2, 5].fill_(INF), False),
    "NaN in x": (lambda w, x: x[1].fill_(NAN), False),
    "infinity in x": (lambda w, x: x[1].fill_(-INF), False),
    "close to the end of float16": (close_to_the_end, None),
}


def make(v, k, dtype, change):
    """(x [K], LM head, norm) on the device."""
    w, x = torch.randn(v, k) * k ** -0.5, torch.randn(k)
    change(w, x)
    head = Linear(None, "lm_head", k, (v,), False, dtype, DEVICE)
    head.load_weight(0, w.to(DEVICE))
    norm = (torch.rand(k, device=DEVICE) + 0.5).to(dtype)
    return x.to(DEVICE, dtype), head, (norm, 1e-5)


def logits_of(head, x):
    out = torch.full((head.linear.ends[-1],), NAN, dtype=x.dtype, device=DEVICE)
    assert head(x, out) is out
    return out


@needs_kernels
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_choice_is_that_of_the_whole_head(name, dtype):
    """What is read has the whole head's bits, and the largest logits are read, in their order."""
    change, finite = CASES[name]
    for v, k, top in ((600, 64, 1), (403, 100, 3), (130, 576, 1)):
        x, linear, norm = make(v, k, dtype, change)
        head = Head(linear, norm, top)
        whole, some = logits_of(Head(linear, norm), x), logits_of(head, x)
        read = some != limits(dtype)[1]  # true for a NaN
        assert torch.equal(whole[read].nan_to_num(nan=7), some[read].nan_to_num(nan=7))
        assert head.rows_read.item() == read.sum() > 0
        assert likeliest(some).tolist() == likeliest(whole).tolist()
        if finite is not None and dtype != torch.float16:
            assert (likeliest(whole).item() >= 0) == finite
        if whole.isfinite().all():
            assert torch.equal(whole.float().topk(top).values, some.float().topk(top).values)
            assert read[whole >= whole.float().topk(top).values[-1]].all()  # all that tie, too


@needs_kernels
def test_few_rows_are_read():
    """As many as the bounds in plain PyTorch leave, or a few more where the k-th largest is meant:
    the kernels take it from groups of rows."""
    for dtype, top in ((torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 6)):
        x, linear, norm = make(1500, 180, dtype, CASES["random"][0])
        head = Head(linear, norm, top)
        logits_of(head, x)
        h = rms_norm(x.float(), norm[0].float(), norm[1])
        expected = likely_rows(*bounds(h, linear.certificate), top, dtype).sum().item()
        assert top <= expected < 60 and head.bounds is linear.certificate
        assert expected * 0.8 - 1 <= head.rows_read.item() <= expected * 4 + 1


@needs_kernels
@pytest.mark.parametrize("penalty", [1.3, 100.0])
def test_the_largest_after_a_repetition_penalty(penalty):
    for sign in (1, -1):  # of the largest logits
        x, linear, norm = make(500, 64, torch.bfloat16, CASES["random"][0])
        if sign < 0:
            linear.w_t.copy_((-x[:, None] / 8 + 0.1 * linear.w_t))
        whole = logits_of(Head(linear, norm), x)
        seen = torch.zeros(500, dtype=torch.bool, device=DEVICE)
        seen[whole.float().topk(30).indices[::2]] = True
        some = logits_of(Head(linear, norm, 4, seen, penalty), x)
        whole, some = (penalize(logits, seen, penalty).topk(4) for logits in (whole, some))
        assert torch.equal(whole.values, some.values) and (some.values > -1e9).all()


@pytest.mark.parametrize("name", CASES)
def test_bounds_hold(name):
    """The norms of a certificate and the bounds of plain PyTorch, against float64."""
    for dtype in (torch.float32, torch.bfloat16):
        x, linear, _ = make(300, 100, dtype, CASES[name][0])
        w, x = linear.w_t.T.double(), x.float()
        certificate = certify(linear.w_t.T)
        scale, error, norm = certificate.rows.double()
        rest = w - certificate.q.double() * scale[:, None]
        sound = w.isfinite().all(1)
        assert (rest.norm(dim=1) <= error)[sound].all() and (w.norm(dim=1) <= norm)[sound].all()
        assert not error[~sound].isfinite().any()
        lower, upper = bounds(x, certificate)
        y = w @ x.double()
        assert not ((lower > y) | (upper < y)).any()
        tight = y.abs() > 1e-20
        tight &= w.abs().amax(1) < 1e30
        if x.isfinite().all():
            width = (upper - lower)[tight & sound] / (w.norm(dim=1) * x.norm())[tight & sound]
            assert (width < 0.1).all()


def test_when_bounds_are_read():
    """Where few logits matter; head and choice agree on it."""
    assert [logits_needed(*case) for case in (
        (0, 50, 1.0), (0, 0, 1.1), (0.7, 50, 1.0), (0.7, 0, 1.0), (0.7, 50, 0.9))] == [
        1, 1, 50, 0, 0]
    assert can_certify(1000, 64, 1) and not can_certify(1000, 64, 0)
    assert not can_certify(1000, 66, 1) and not can_certify(1000, 20000, 1)
    assert not can_certify(10, 64, 11) and not can_certify(200000, 64, 1000)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["_bounds_kernel", "_rows_kernel"])
def test_weights_are_asked_for_before_x(name):
    """Compiled for a Hopper GPU, both kernels load 16 bytes at once, before they wait."""
    kernel = getattr(head, name)
    types = {"x_ptr": "*bf16", "norm_ptr": "*bf16", "logits_ptr": "*bf16", "eps": "fp32"}
    types |= {"_bounds_kernel": {"q_ptr": "*i32", "rows_ptr": "*fp32", "upper_ptr": "*fp32",
                                 "lower_ptr": "*fp32", "penalty": "fp32"},
              "_rows_kernel": {"w_ptr": "*bf16", "read_ptr": "*i64"}}[name]
    constants = {name: None for name in kernel.arg_names if name not in types} | {
        "K": 2048, "V": 128256, "LIMIT": 1.0, "LARGEST": 32512, "ROWS": 4, "WORDS": 512,
        "FILL": -1.0, "BLOCK": 256, "K_PADDED": 2048, "PDL": True, "TOP": 1, "GROUPS": 1,
        "GROUPS_PADDED": 1}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]]
               for name, kind in types.items() if kind != "fp32"}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned),
                              target=GPUTarget("cuda", 90, 32),
                              options={"num_warps": 4, "launch_pdl": True})
    before, _, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
    assert before.count("ld.global") >= 4 and ".v4." in before
    assert "ld.global" in after and ("dp4a" in after) == (name == "_bounds_kernel")
