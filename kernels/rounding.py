"""Round half to even as a Triton device function: no instruction of one device, no library."""

import triton
import triton.language as tl


@triton.jit
def rint(v):
    """f32 like v, the nearest integer, ties to even, whatever its size; infinities and NaN stay. Compile without contraction."""
    size = tl.abs(v)
    # From 2²³ on every number is an integer; below, the sum's last bit is worth 1.
    near = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(v < 0, -near, near)
