"""Tests of 4-bit weights: rounding, prefill. test_products.py has a step's products."""

import pytest
import torch

import quantize
from cli.accounting import bytes_per_weight
from conftest import DEVICE
from model import dense
from quantize import Int4Linear, dequantize, quantize_int4, split_groups

pytestmark = pytest.mark.usefixtures("seed")


def rounded(weight):
    """Weights [N, K] -> (w_t, scale) as an `Int4Linear` holds them."""
    return [part.contiguous() for part in split_groups(quantize_int4(weight))]


@pytest.mark.parametrize("n, k", [(96, 400), (4096, 300)])
def test_the_search_is_better_than_rounding_to_nearest(n, k):
    """And better than one fit to the whole range, which reaches 0.96 and 0.84."""
    for weight, share in ((torch.randn(n, k), 0.945), (torch.randn(n, k) ** 3, 0.81)):
        w_t, scale = rounded(weight)
        assert w_t.dtype == torch.uint8 and w_t.shape == (k, n // 2)
        assert scale.dtype == torch.bfloat16 and scale.shape == (k, n // 32, 2)
        error = (dequantize(w_t, scale).T - weight).norm()
        w = weight.T.reshape(k, -1, 32)  # rounded between the extremes of each group:
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        step = (high - low) / 15
        assert error < share * (((w - low) / step).round() * step + low - w).norm()


def test_every_share_of_the_range_finds_something(monkeypatch):
    weight, shares = torch.randn(64, 2000) ** 3, quantize.SHARES  # with outliers

    def error(shares):
        monkeypatch.setattr(quantize, "SHARES", shares)
        return (dequantize(*rounded(weight)).T - weight).square().sum()

    assert len(shares) == 6
    for i in range(6):
        assert error(shares[:i] + shares[i + 1:]) > error(shares)


def test_what_int4_can_hold_stays_exactly_and_where_it_lies():
    """Group g of channel k holds columns 32 g ... 32 g + 31: 16 bytes, then scale and minimum."""
    q = torch.rand(3, 5, 32).argsort(-1) % 16  # [groups, channels, columns]
    weight = (q * 0.25 - 2).transpose(1, 2).reshape(96, 5)
    groups = quantize_int4(weight)
    assert groups.dtype == torch.uint8 and groups.shape == (3, 5, 20)
    assert torch.equal(torch.cat((groups[..., :16] & 15, groups[..., :16] >> 4), -1), q)
    scales = groups[..., 16:].contiguous().view(torch.bfloat16)
    assert torch.equal(scales.float(), torch.tensor([0.25, -2.0]).expand(3, 5, 2))
    for exact in (weight, *(torch.full((64, 3), constant) for constant in (0.0, 0.5, -3.0))):
        assert torch.equal(dequantize(*rounded(exact)).T, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    """With 3e38, sums of weights overflow."""
    weight = torch.zeros(32, 4)
    weight[5, 2], weight[6, 2] = value, -value
    with pytest.raises(ValueError, match="tensor up holds weights that are infinite, NaN or"):
        quantize_int4(weight, "up")


def test_dense_products():
    linear = Int4Linear(0, "qkv", 50, (96, 32, 64), True, torch.float32, DEVICE)
    for i, width in enumerate(linear.widths):
        linear.load_weight(i, torch.randn(width, 50, device=DEVICE))
        linear.load_bias(i, torch.randn(width, device=DEVICE))
    x = torch.randn(20, 50, device=DEVICE)
    wanted = x.double() @ dequantize(linear.w_t, linear.scale).double() + linear.bias
    torch.testing.assert_close(dense(x, linear).double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear.weight(96, 192), dequantize(linear.w_t, linear.scale)[:, 96:])
    assert bytes_per_weight(linear, 0) * 50 * 192 == linear.w_t.nbytes + linear.scale.nbytes
