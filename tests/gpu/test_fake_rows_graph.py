"""Rows rounded to low bits and back, in a captured graph."""

import pytest
import torch
from qzo_kernels.ops_asym import fake_quantize_rows
from qzo_kernels.reference_qat import fake_quantize_rows as expected_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cols", [64, 300, 5120])
def test_a_graph_reads_x_and_span_anew(cols):
    """One kernel, which waits for nothing; a replay sees what stands in x and in the span by then."""
    x, span = torch.randn(2, 6, 5, cols, device="cuda", dtype=torch.bfloat16).transpose(1, 2), torch.ones(1, device="cuda")
    fake_quantize_rows(x, 4, span)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = fake_quantize_rows(x, 4, span)
    x.mul_(-3)
    span.fill_(0.7)
    graph.replay()
    assert torch.equal(seen, expected_of(x, 4, span)) and seen.stride() == x.stride()


def test_one_launch():
    x = torch.randn(2, 6, 5, 64, device="cuda").transpose(1, 2)
    fake_quantize_rows(x, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fake_quantize_rows(x, 4)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA and "sync" not in event.name.lower()]
    assert len(kernels) == 1 and "fake" in kernels[0]
