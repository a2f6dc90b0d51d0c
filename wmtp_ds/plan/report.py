"""A plan for people, and for programs."""

from dataclasses import asdict, dataclass
from typing import Any

from wmtp_ds.plan.plan import GIB, Fit, Plan, Variant
from wmtp_ds.plan.step import COMPONENTS

_DTYPES = {2: "16 bits with float32 masters", 4: "float32"}


@dataclass(frozen=True)
class Basis:
    """What a plan is of: the config's file as typed, the stage, what sizes rest on, and what else was assumed."""

    config: str
    stage: str
    notes: list[str]
    assumed: list[str]


def as_dict(plan: Plan, basis: Basis) -> dict[str, Any]:
    """For JSON; sizes are bytes."""
    return {
        **asdict(basis),
        "device": plan.setup.device,
        "ranks": plan.setup.ranks,
        "capacity": plan.capacity,
        "setup": asdict(plan.setup),
        "moments": {moment.name: moment.bytes for moment in plan.configured.moments},
        "configured": _variant(Variant("as configured", plan.configured, is_configured=True), plan),
        "variants": [_variant(variant, plan) for variant in plan.variants],
        "advice": [_variant(variant, plan) for variant in plan.advice()],
        "fits": plan.fits,
    }


def _variant(variant: Variant, plan: Plan) -> dict[str, Any]:
    fit = variant.fit
    return {
        "label": variant.label,
        "configured": variant.is_configured,
        "tensors": fit.peak.total,
        "overhead": fit.overhead(fit.peak),
        "total": fit.total,
        "peak": fit.peak.name,
        "host": fit.host_parts,
        "fits": fit.fits(plan.capacity),
        "spare": plan.capacity - fit.total,
    }


def lines(plan: Plan, basis: Basis) -> list[str]:
    """For people."""
    setup = plan.setup
    one = "GPU" if setup.device == "cuda" else "CPU rank"
    many = one if setup.ranks == 1 else f"{one}s"
    work = [
        f"{setup.batch} x {setup.length} tokens a micro-batch",
        _DTYPES[setup.b],
        "gradient checkpointing" if setup.checkpointing else "no gradient checkpointing",
        "Adam" if setup.adam else "SGD",
        f"{setup.kernels} kernels",
    ]
    return [
        f"{basis.config}: stage {basis.stage} on {setup.ranks} {many}, {_gib(plan.capacity)} GiB each",
        *(f"  {note}" for note in basis.notes),
        f"  {', '.join(work)}",
        *(f"  assumed: {text}" for text in basis.assumed),
        "",
        *_moments(plan.configured, one),
        "",
        *_variants(plan.variants, plan, f"on each {one}, at most"),
        "",
        *_verdict(plan, one),
    ]


def _moments(fit: Fit, one: str) -> list[str]:
    """Components by rows, moments by columns."""
    moments = fit.moments
    rows = [(name, [moment.bytes.get(name, 0) for moment in moments]) for name in COMPONENTS]
    rows = [(name, values) for name, values in rows if any(values)]
    rows.append(("beside tensors", [fit.overhead(moment) for moment in moments]))
    rows.append(("total", [moment.total + fit.overhead(moment) for moment in moments]))
    width = max(len(name) for name, _ in rows)
    head = f"GiB on each {one}"
    width = max(width, len(head))
    columns = [max(len(moment.name), 8) for moment in moments]
    found = ["  ".join([head.ljust(width), *(m.name.rjust(c) for m, c in zip(moments, columns, strict=True))])]
    for name, values in rows:
        cells = ((_gib(value) if value else "-").rjust(column) for value, column in zip(values, columns, strict=True))
        found.append("  ".join([name.ljust(width), *cells]))
    return found


def _variants(variants: list[Variant], plan: Plan, head: str) -> list[str]:
    width = max(len(head), *(len(_label(variant)) for variant in variants))
    found = [f"{head.ljust(width)}  {'GiB':>8}  {'spare':>8}  {'host GiB':>8}  peak at"]
    for variant in variants:
        fit = variant.fit
        host = _gib(fit.host) if fit.host else "-"
        spare = _gib(plan.capacity - fit.total)
        verdict = "" if fit.fits(plan.capacity) else ", does not fit"
        found.append(
            f"{_label(variant).ljust(width)}  {_gib(fit.total):>8}  {spare:>8}  {host:>8}  {fit.peak.name}{verdict}"
        )
    return found


def _label(variant: Variant) -> str:
    is_way = variant.is_configured and variant.label != "as configured"
    return f"{variant.label} (as configured)" if is_way else variant.label


def _verdict(plan: Plan, one: str) -> list[str]:
    total, capacity = plan.configured.total, plan.capacity
    if plan.fits:
        share = 100 * (capacity - total) / capacity
        return [f"fits: {_gib(total)} of {_gib(capacity)} GiB, {_gib(capacity - total)} to spare ({share:.0f} %)"]
    return [
        f"does not fit: {_gib(total)} GiB are needed, {_gib(capacity)} are there, {_gib(total - capacity)} are missing",
        *_variants(plan.advice(), plan, "what would change it"),
    ]


def _gib(nbytes: int) -> str:
    size = nbytes / GIB
    return f"{size:.3f}" if abs(size) < 0.1 else f"{size:.2f}" if abs(size) < 10 else f"{size:.1f}"
