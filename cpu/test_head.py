"""Bounds of the LM head's logits: against float64, and in the step in C against the whole head."""

import pytest
import torch

import lm_head
from conftest import DEVICE, HEAD_SIZES, HEADS, check_head, make_head, random_model
from cpu.step import CStep
from lm_head import bounds, certificate_for, certify, likely_rows, limits, logits_needed
from model import Config, KVCache, Linear, rms_norm
from sampling import largest, likeliest, penalize, sample

pytestmark = pytest.mark.usefixtures("seed", "any_head")


def make_steps(v, k, dtype, change, *heads):
    """(x, head, norm, steps in C): of a model whose hidden state is x, one for each of `heads`."""
    x, head, norm = make_head(v, k, dtype, change, "cpu")
    config = Config(v, k, 32, 1, 2, 1, 16, context=8)
    model = random_model(config, device="cpu")
    model.lm_head, model.norm, model.embedding[5] = head, norm[0], x
    model.blocks[0].o.w_t.zero_(), model.blocks[0].down.w_t.zero_()
    thresholds, kept = torch.full((1, 7), -1.0), torch.zeros(1, 7, dtype=torch.int64)
    return x, head, norm, [
        CStep(model, KVCache(config, 8), thresholds, kept, 2, **options)
        for options in heads]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_step_in_c_chooses_as_with_the_whole_head(name, dtype):
    for v, k, top in HEAD_SIZES:
        *_, (whole, some) = make_steps(v, k, dtype, HEADS[name][0], {}, {"top": top})
        assert whole.bounds is None
        for _ in range(2):  # the second time finds its memory as the first left it
            check_head(whole(5, 0), some(5, 0), some.head_rows.sum().item(), top, likeliest)


@pytest.mark.parametrize("top", [1, 6])
def test_the_step_in_c_reads_few_rows(top):
    """As many as the bounds in plain PyTorch leave; or more where the 6th largest is meant, which
    is found among the largest of groups. A repetition penalty counts."""
    x, head, norm, (whole, some) = make_steps(
        3000, 192, torch.bfloat16, HEADS["random"][0], {}, {"top": top})
    logits = whole(5, 0)
    check_head(logits, some(5, 0), some.head_rows.sum().item(), top, likeliest)
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


@pytest.mark.parametrize("name", HEADS)
def test_bounds_hold(name):
    """The norms of a certificate and the bounds of plain PyTorch, against float64."""
    for dtype in (torch.float32, torch.bfloat16):
        x, linear, _ = make_head(300, 100, dtype, HEADS[name][0])
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
        for rounded in (torch.float32, torch.bfloat16, torch.float16):
            logits = y.to(rounded)  # none of the largest is left out
            best = logits >= logits.topk(5).values[-1]
            assert (likely_rows(lower, upper, 5, rounded) | ~best).all()


def test_ties_are_drawn_as_from_the_whole_head():
    """16-bit logits tie often, also at the k-th place: of equals, the first ids are the likeliest,
    whether smaller logits are there or not."""
    for v, k, step in ((100, 20, 1.0), (5000, 50, 0.125), (40, 40, 0.5)):
        logits = (torch.randn(v, device=DEVICE) / step).round() * step + 0.0  # no -0
        values, ids = logits.sort(descending=True, stable=True)
        some = torch.where(logits < values[k - 1], limits(torch.bfloat16)[1], logits)
        for y in (logits, some):
            assert [part.tolist() for part in largest(y, k)] == [
                values[:k].tolist(), ids[:k].tolist()]
        a, b = ([sample(y, 0.9, k, 0.95, generator=torch.Generator(DEVICE).manual_seed(i)).item()
                 for i in range(20)] for y in (logits, some))
        assert a == b


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
