"""Rounding to 8 and 4 bits, by hand."""

from __future__ import annotations

import torch

from sku.quantization import NF4_CODE, int8_rounded, nf4_rounded


def test_int8_by_hand() -> None:
    """The largest of a channel, 1.27, is 127 steps of 0.01; each channel has its own step; zeros stay."""
    weight = torch.tensor([[1.27, 0.014, -0.016], [127.0, 1.4, -0.6], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.27, 0.01, -0.02], [127.0, 1.0, -1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(int8_rounded(weight), expected)


def test_nf4_by_hand() -> None:
    """Blocks of 64, the last one short: values of the code times the block's largest magnitude stay as they are."""
    code = torch.tensor(NF4_CODE)
    weight = torch.cat([2.0 * code.repeat(4), 3.0 * code[8:], torch.zeros(8)])
    torch.testing.assert_close(nf4_rounded(weight.reshape(2, 40)).reshape(-1), weight)
    between = torch.tensor([[1.0, 0.0401, 0.0397, -0.9]])
    expected = torch.tensor([[1.0, NF4_CODE[8], 0.0, -1.0]])
    torch.testing.assert_close(nf4_rounded(between), expected)
    assert not nf4_rounded(torch.zeros(1, 64)).any()


def test_rounding_twice_is_rounding_once() -> None:
    weight = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    for rounding in (int8_rounded, nf4_rounded):
        once = rounding(weight)
        torch.testing.assert_close(rounding(once), once)
        assert 0 < float((once - weight).abs().max()) < float(weight.abs().max()) / 4
