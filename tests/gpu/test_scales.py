"""Scales that a format stores in another form: the same bits on a CUDA device as on a CPU, so that a journal replays on either."""

import pytest
import torch

from qzo.model import bnb8_format

pytestmark = pytest.mark.gpu


def test_llm_int8():
    scb = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3
    scales = bnb8_format.scales_of(scb)
    assert torch.equal(bnb8_format.scales_of(scb.cuda()).cpu(), scales)
    moved = scales * 1.01
    assert torch.equal(bnb8_format.rounded(None, "", moved[:, None].cuda()).cpu(), bnb8_format.rounded(None, "", moved[:, None]))
    assert torch.equal(bnb8_format.scb_of(scales[:, None].cuda(), scb.cuda()).cpu(), scb)
