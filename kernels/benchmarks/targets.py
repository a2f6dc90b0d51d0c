"""What was promised, as ratios of one run, and whether it was kept.

A target is judged where its own sizes were measured on its own kind of device; anywhere else it is "not measured".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GPU_SIZES = {"heads": 4, "positions": 8192, "dim": 4096, "vocabulary": 32_000, "dtype": "bfloat16"}
CPU_SIZES = {"heads": 4, "positions": 1024, "dim": 512, "vocabulary": 32_000, "dtype": "float32"}
BANDWIDTH_POSITIONS = 2**26
_CPU_K = 0.6

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """One line of the table of targets.

    Attributes:
        device: "cuda" or "cpu".
        text: the case in words.
        arm: whose figure it is.
        quantity: "time" (arm's over ``against``'s, at most), "speedup" (``against``'s time over the arm's, at least),
            "memory" (extra bytes, at most), "memory ratio" (arm's extra bytes over ``against``'s, at most),
            "bandwidth" (copy's time over the kernel's, at least).
        limit: the number.
        against: another arm.
        k_percent: the share that it is meant for, if only one.
    """

    device: str
    text: str
    arm: str
    quantity: str
    limit: float
    against: str = ""
    k_percent: float | None = None

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.quantity in ("speedup", "bandwidth")

    def kept_by(self, value: float) -> bool:
        """Whether a measured value keeps it."""
        return value >= self.limit if self.at_least else value <= self.limit

    def limit_text(self) -> str:
        """For the table."""
        sign = ">=" if self.at_least else "<="
        return f"{sign} {self.limit / 1e9:.2f} GB" if self.quantity == "memory" else f"{sign} {self.limit:.3g}"


@dataclass(frozen=True)
class Verdict:
    """A target, the value found (None where there is none), "met", "missed" or "not measured", and why."""

    target: Target
    value: float | None
    verdict: str
    reason: str = ""


def rho1_operations(k_percent: float, logits_kept: bool) -> float:
    """Rho-1's operations over those of F: one product for the losses of all rows, then gradients of the selected.

    Where the group fits a chunk its logits are at hand, and two products are left: ``(2 + 4k)/6``. Otherwise the
    selected rows' logits are computed again: ``(2 + 6k)/6``.
    """
    return (2 + (4 if logits_kept else 6) * k_percent) / 6


def all_targets(k_percent: float) -> list[Target]:
    """The targets of GPUs (for one H100) and of CPUs."""
    slower = [
        ("liger-none", 1.5, "Liger, none x weights"),
        ("liger-none-float32", 1.35, "Liger, none x weights, float32 sums"),
        ("liger-mean", 1.15, "Liger, mean"),
        ("liger-mean-float32", 1.05, "Liger, mean, float32 sums"),
        ("cut", 2.0, "cut cross-entropy"),
        ("cut-exact", 2.5, "cut cross-entropy, exact"),
        ("torch-chunked-mean", 1.25, "torch chunked, mean"),
        ("torch-chunked-none", 1.6, "torch chunked, none x weights"),
    ]
    within, beyond = 1.12 * rho1_operations(k_percent, True), 1.12 * rho1_operations(k_percent, False)
    gpu = [
        Target("cuda", "TD weights: time over F", "td", "time", 1.10, "floor"),
        *(Target("cuda", f"{text}: time over ours", "td", "speedup", limit, arm) for arm, limit, text in slower),
        Target("cuda", "Rho-1, group within a chunk: time over F", "rho1-sequence", "time", within, "floor"),
        Target("cuda", "Rho-1, group larger than a chunk: time over F", "rho1-batch", "time", beyond, "floor"),
        *(
            Target("cuda", f"{arm}: memory beyond inputs and gradients", arm, "memory", 1.1e9)
            for arm in ("weighted", "td", "rho1-sequence", "rho1-batch")
        ),
        *(
            Target("cuda", f"{kernel} kernel: share of a copy's bandwidth", kernel, "bandwidth", 0.8)
            for kernel in ("td-weights", "gae-weights")
        ),
    ]
    cpu = [
        line
        for arm in ("weighted", "td")
        for line in (
            Target("cpu", f"{arm}: time over plain torch", arm, "time", 0.95, "torch"),
            Target("cpu", f"{arm}: extra memory over plain torch's", arm, "memory ratio", 0.2, "torch"),
        )
    ] + [
        Target("cpu", f"{arm}, k = {_CPU_K}: time over plain torch", arm, "time", 0.85, "torch", _CPU_K)
        for arm in ("rho1-sequence", "rho1-batch")
    ]
    return gpu + cpu


def _missing(target: Target, run: Mapping[str, Any]) -> str:
    """Why a target cannot be judged by this run, or ""."""
    sizes = GPU_SIZES if target.device == "cuda" else CPU_SIZES
    if run["device"] != target.device:
        return f"it is for a {'GPU' if target.device == 'cuda' else 'CPU'}"
    if target.quantity == "bandwidth":
        enough = run["bandwidth_positions"] >= BANDWIDTH_POSITIONS
        return "" if enough else f"it is for {BANDWIDTH_POSITIONS:,} positions, far more than fit a cache"
    if any(run[name] != value for name, value in sizes.items()):
        asked = f"{sizes['heads']} heads x {sizes['positions']}, D {sizes['dim']}, V {sizes['vocabulary']}"
        return f"it is for {asked}, {sizes['dtype']}"
    if target.k_percent is not None and run["k_percent"] != target.k_percent:
        return f"it is for k = {target.k_percent}"
    return ""


def _value(
    target: Target, results: Mapping[str, Mapping[str, Any]], bandwidth: Mapping[str, Any]
) -> tuple[float | None, str]:
    """The figure that a target is about; or None, and whose fault it is."""
    if target.quantity == "bandwidth":
        share = bandwidth["share_of_copy"].get(target.arm)
        return (share["median"], "") if share else (None, bandwidth["reason"])
    for name in filter(None, (target.arm, target.against)):
        if name not in results:
            return None, f"the arm {name} was not asked for"
        if results[name]["status"] != "measured":
            return None, f"{name}: {results[name]['reason']}"
    ours, other = results[target.arm], results.get(target.against, {})
    if target.quantity == "time":
        return ours["ratios"][target.against]["median"], ""
    if target.quantity == "speedup":
        return other["ratios"][target.arm]["median"], ""
    if ours["extra_bytes"] is None:
        return None, "peak memory could not be measured"
    if target.quantity == "memory":
        return float(ours["extra_bytes"]), ""
    if not other["extra_bytes"]:
        return None, "plain torch took no memory beyond inputs and gradients"
    return ours["extra_bytes"] / other["extra_bytes"], ""


def judge(
    targets: list[Target],
    run: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    bandwidth: Mapping[str, Any],
) -> list[Verdict]:
    """Hold the targets against what was measured.

    Args:
        targets: what to judge.
        run: device, sizes, dtype and k_percent of the run.
        results: arm -> its results at the run's main size, as in the JSON.
        bandwidth: the JSON's part of that name.

    Returns:
        A verdict for each target. An arm of ours whose result is wrong has missed its targets.
    """
    verdicts = []
    for target in targets:
        missing = _missing(target, run)
        value, reason = (None, missing) if missing else _value(target, results, bandwidth)
        if value is not None:
            verdicts.append(Verdict(target, value, "met" if target.kept_by(value) else "missed"))
        elif not missing and "wrong" in (
            bandwidth["status"] if target.quantity == "bandwidth" else "",
            results.get(target.arm, {}).get("status"),
        ):
            verdicts.append(Verdict(target, None, "missed", reason))
        else:
            verdicts.append(Verdict(target, None, NOT_MEASURED, reason))
    return verdicts
