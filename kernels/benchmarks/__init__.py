"""What measures ``wmtp_kernels``: its losses against their alternatives, interleaved in one process.

Needs torch, triton and ``wmtp_kernels`` alone; every other library is an arm of its own, skipped where it is absent.
Run it with ``wmtp-ds bench kernels``, or from ``kernels/`` with ``python -m benchmarks``.
"""
