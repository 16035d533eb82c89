"""The LM head with bounds against the whole LM head: on a GPU, or in Triton's interpreter, which
test_sparse_gemv.py starts."""

import pytest
import torch

from conftest import (
    DEVICE,
    HEAD_SIZES,
    HEADS,
    NAN,
    check_head,
    error,
    make_head,
    needs_kernels,
    reference,
)
from gpu.head import Head
from gpu.token_kernels import likeliest_on_gpu
from lm_head import bounds, likely_rows
from model import rms_norm
from sampling import penalize

pytestmark = pytest.mark.usefixtures("seed", "any_head")


def logits_of(head, x):
    """What the kernels hand over, and the logits, are NaN or out of range before the call."""
    if head.bounds is not None:
        head.upper.fill_(NAN), head.lower.fill_(NAN), head.list.fill_(1 << 30)
    out = torch.full((head.linear.ends[-1],), NAN, dtype=x.dtype, device=DEVICE)
    assert head(x, out) is out
    return out


@needs_kernels
@pytest.mark.parametrize("name", HEADS)
def test_the_choice_is_that_of_the_whole_head(name, seed):
    """Each case in one size and dtype, another time in others."""
    change, finite = HEADS[name]
    size, dtype = divmod((seed + list(HEADS).index(name)) % 9, 3)
    (v, k, top), dtype = HEAD_SIZES[size], (torch.float32, torch.bfloat16, torch.float16)[dtype]
    x, linear, norm = make_head(v, k, dtype, change)
    head = Head(linear, norm, top)
    whole, some = logits_of(Head(linear, norm), x), logits_of(head, x)
    check_head(whole, some, head.rows_read.item(), top, likeliest_on_gpu)
    if finite is not None and dtype != torch.float16:
        assert (likeliest_on_gpu(whole).item() >= 0) == finite


@needs_kernels
def test_few_rows_are_read():
    """As many as the bounds in plain PyTorch leave, or a few more where the k-th largest is meant:
    the kernels take it from groups of rows."""
    for dtype, top in ((torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 6)):
        x, linear, norm = make_head(400, 180, dtype, HEADS["random"][0])
        head = Head(linear, norm, top)
        logits_of(head, x)
        h = rms_norm(x.float(), norm[0].float(), norm[1])
        expected = likely_rows(*bounds(h, linear.certificate), top, dtype).sum().item()
        assert top <= expected < 60 and head.bounds is linear.certificate
        assert expected * 0.8 - 1 <= head.rows_read.item() <= expected * 4 + 1


@needs_kernels
def test_a_head_in_int8():
    """One product, with the RMSNorm: W^T as a GPU keeps it."""
    x, linear, norm = make_head(96, 64, torch.float32, HEADS["random"][0])
    linear.w_t = torch.randint(-127, 128, (64, 96), dtype=torch.int8, device=DEVICE)
    linear.scale = torch.rand(96, device=DEVICE) / 100
    y = logits_of(Head(linear, norm, 1), x)
    expected = reference(x, linear.w_t, None, scale=linear.scale, norm=norm)
    assert Head(linear, norm, 1).bounds is None and error(y, expected) <= 1e-5


@needs_kernels
@pytest.mark.parametrize("name, penalty", [("random", 1.3), ("negative logits", 100.0)])
def test_the_largest_after_a_repetition_penalty(name, penalty):
    x, linear, norm = make_head(500, 64, torch.bfloat16, HEADS[name][0])
    whole = logits_of(Head(linear, norm), x)
    seen = torch.zeros(500, dtype=torch.bool, device=DEVICE)
    seen[whole.float().topk(30).indices[1:]] = True
    some = logits_of(Head(linear, norm, 4, seen, penalty), x)
    whole, some = (penalize(logits, seen, penalty).topk(4) for logits in (whole, some))
    assert torch.equal(whole.values, some.values) and (some.values > -1e9).all()
