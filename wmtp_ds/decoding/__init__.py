"""Text from a policy: token by token, or several at a time with its own extra heads."""

from wmtp_ds.decoding.generate import Completion, Limits, generate
from wmtp_ds.decoding.sampling import Sampling
from wmtp_ds.decoding.transformers_generate import generate_by_transformers

__all__ = ["Completion", "Limits", "Sampling", "generate", "generate_by_transformers"]
