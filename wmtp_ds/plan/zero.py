"""What a DeepSpeed JSON says about memory, with DeepSpeed's defaults for what it does not say."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from wmtp_ds.errors import UserError

# Class of the block that ds_configs/ name a leaf: its parameters are gathered and released together.
BLOCK_CLASS = "LlamaDecoderLayer"


@dataclass(frozen=True)
class ZeroSettings:
    """The part of ``zero_optimization`` that decides memory, with DeepSpeed's defaults; counts are of elements.

    Attributes:
        prefetch_bucket: gathered ahead of use.
        persistence_threshold: parameters of up to this size stay gathered.
        max_live: no prefetching beyond this.
        max_reuse: a parameter that is used again within this distance is not released.
        reduce_bucket: gradients are reduced once there are so many.
        sub_group: the optimizer steps through its partition in groups of this size.
        contiguous: whether the bucket is a buffer of its own.
        overlap: whether reductions run beside the backward pass.
        block_is_leaf: whether a block's parameters are gathered together.
        offload_optimizer, offload_parameters: whether these live in host memory.
        gradient_bytes: of an accumulated gradient, 0 for the compute dtype's.
    """

    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    reduce_bucket: int = 500_000_000
    sub_group: int = 1_000_000_000
    contiguous: bool = True
    overlap: bool = True
    block_is_leaf: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gradient_bytes: int = 0

    def offloaded(self, *, optimizer: bool, parameters: bool) -> "ZeroSettings":
        """The same with other offloading."""
        return replace(self, offload_optimizer=optimizer, offload_parameters=parameters)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "ZeroSettings":
        """From a DeepSpeed config.

        Raises:
            UserError: if it is not for stage 3, or offloads to a disk, of which nothing is planned here.
        """
        zero = values.get("zero_optimization")
        if not isinstance(zero, dict) or zero.get("stage") != 3:
            raise UserError(f"{where}: only ZeRO stage 3 can be planned, since only that trains here.")
        names = {
            "prefetch_bucket": "stage3_prefetch_bucket_size",
            "persistence_threshold": "stage3_param_persistence_threshold",
            "max_live": "stage3_max_live_parameters",
            "max_reuse": "stage3_max_reuse_distance",
            "reduce_bucket": "reduce_bucket_size",
            "sub_group": "sub_group_size",
        }
        found: dict[str, Any] = {ours: int(zero[theirs]) for ours, theirs in names.items() if theirs in zero}
        for ours, theirs in (("contiguous", "contiguous_gradients"), ("overlap", "overlap_comm")):
            if zero.get(theirs) is not None:
                found[ours] = bool(zero[theirs])
        for ours, theirs in (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param")):
            device = (zero.get(theirs) or {}).get("device", "none")
            if device == "nvme":
                raise UserError(f'{where}: "{theirs}" goes to nvme, which cannot be planned; plan with "cpu" there.')
            found[ours] = device == "cpu"
        classes = (zero.get("leaf_module") or {}).get("classes") or []
        found["block_is_leaf"] = any(str(name).endswith(BLOCK_CLASS) for name in classes)
        accumulation = (values.get("data_types") or {}).get("grad_accum_dtype")
        found["gradient_bytes"] = 0 if accumulation is None else 4 if "32" in str(accumulation) else 2
        return cls(**found)
