"""A kernel that asks of Triton's interpreter what all of this package's do: a loop up to an argument."""

import triton
import triton.language as tl


@triton.jit
def probe(out, count):
    total = 0
    for i in range(count):
        total += i
    tl.store(out, total)
