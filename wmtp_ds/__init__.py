"""wmtp-ds: training multi-token-prediction policies with per-token weights on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
