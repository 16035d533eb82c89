"""Bounds of the LM head's logits: against float64, and in the step in C against the whole head."""

import pytest
import torch

import lm_head
from checkpoint.files import cache_folder
from conftest import DEVICE, INTERPRETED, random_model
from cpu.step import CStep
from lm_head import bounds, certificate_for, certify, likely_rows, limits, logits_needed
from model import Config, KVCache, Linear, rms_norm
from sampling import likeliest, penalize

NAN, INF = float("nan"), float("inf")


pytestmark = pytest.mark.usefixtures("seed", "any_head")


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


SIZES = ((600, 64, 1), (403, 100, 3), (130, 576, 1))  # V, K, how many logits matter


def make(v, k, dtype, change, device=DEVICE):
    """(x [K], LM head, norm): the case that `change` makes."""
    w, x = torch.randn(v, k) * k ** -0.5, torch.randn(k)
    change(w, x)
    head = Linear(None, "lm_head", k, (v,), False, dtype, device)
    head.load_weight(0, w.to(device))
    norm = (torch.rand(k, device=device) + 0.5).to(dtype)
    return x.to(device, dtype), head, (norm, 1e-5)


def check(whole, some, n_read, top, choose):
    """What is read has the whole head's bits, and the `top` largest are read, and all that tie."""
    read = some != limits(some.dtype)[1]  # true for a NaN
    assert torch.equal(whole[read].nan_to_num(nan=7), some[read].nan_to_num(nan=7))
    assert n_read == read.sum() > 0
    assert choose(some).tolist() == choose(whole).tolist()
    if whole.isfinite().all():
        assert torch.equal(whole.float().topk(top).values, some.float().topk(top).values)
        assert read[whole >= whole.float().topk(top).values[-1]].all()


def make_steps(v, k, dtype, change, *heads):
    """(x, head, norm, steps in C): of a model whose hidden state is x, one for each of `heads`."""
    x, head, norm = make(v, k, dtype, change, "cpu")
    config = Config(v, k, 32, 1, 2, 1, 16, context=8)
    model = random_model(config, device="cpu")
    model.lm_head, model.norm, model.embedding[5] = head, norm[0], x
    model.blocks[0].o.w_t.zero_(), model.blocks[0].down.w_t.zero_()
    thresholds, kept = torch.full((1, 7), -1.0), torch.zeros(1, 7, dtype=torch.int64)
    return x, head, norm, [
        CStep(model, KVCache(config, 8), thresholds, kept, cache_folder(), 2, **options)
        for options in heads]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs no C")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_step_in_c_chooses_as_with_the_whole_head(name, dtype):
    for v, k, top in SIZES:
        *_, (whole, some) = make_steps(v, k, dtype, CASES[name][0], {}, {"top": top})
        assert whole.bounds is None
        for _ in range(2):  # the second time finds its memory as the first left it
            check(whole(5, 0), some(5, 0), some.head_rows.sum().item(), top, likeliest)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs no C")
@pytest.mark.parametrize("top", [1, 6])
def test_the_step_in_c_reads_few_rows(top):
    """As many as the bounds in plain PyTorch leave; or more where the 6th largest is meant, which
    is found among the largest of groups. A repetition penalty counts."""
    x, head, norm, (whole, some) = make_steps(
        3000, 192, torch.bfloat16, CASES["random"][0], {}, {"top": top})
    logits = whole(5, 0)
    check(logits, some(5, 0), some.head_rows.sum().item(), top, likeliest)
    h = rms_norm(x.float(), norm[0].float(), norm[1])
    expected = likely_rows(*bounds(h, head.certificate), top, torch.float32).sum().item()
    assert top <= expected < 100
    assert expected * 0.8 - 1 <= some.head_rows.sum().item() <= expected * (1.2 if top == 1 else 4)
    for shift in (0, -0.04):  # the largest logits are positive, negative
        seen = torch.zeros(3000, dtype=torch.bool)
        x, head, norm, (whole, some) = make_steps(
            3000, 192, torch.bfloat16, lambda w, x: w.add_(shift * x), {},
            {"top": top, "seen": seen, "penalty": 1.3})
        logits = whole(5, 0)
        assert (logits.max() > 0) == (shift == 0)
        seen[logits.topk(30).indices[::2]] = True
        largest = [penalize(y, seen, 1.3).topk(top).values for y in (logits, some(5, 0))]
        assert torch.equal(*largest) and some.head_rows.sum() < 2000


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


def test_when_bounds_are_read(monkeypatch):
    """Where few logits matter; head and choice agree on it."""
    assert [logits_needed(*case) for case in (
        (0, 50, 1.0), (0, 0, 1.1), (0.7, 50, 1.0), (0.7, 0, 1.0), (0.7, 50, 0.9))] == [
        1, 1, 50, 0, 0]
    for v, k, top in ((100, 64, 1), (100, 64, 0), (100, 66, 1), (9, 20000, 1), (10, 64, 11),
                      (2000, 64, 1000)):
        linear = Linear(None, "lm_head", k, (v,), False, torch.bfloat16, "cpu")
        assert (certificate_for(linear, top) is None) == ((v, k, top) != (100, 64, 1))
    monkeypatch.setattr(lm_head, "LEAST_WEIGHTS", 6401)
    linear = Linear(None, "lm_head", 64, (100,), False, torch.bfloat16, "cpu")
    assert certificate_for(linear, 1) is None


