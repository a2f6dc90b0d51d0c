"""Early stopping against a brute-force reading of the definitions, and by hand."""

import json
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds.early_stopping import EarlyStopping

INF = math.inf


def config(**options):
    values = {
        "enabled": True,
        "mode": "any",
        "monitor": "loss",
        "patience": 3,
        "min_delta": 0.0,
        "grad_norm_threshold": 50.0,
        "grad_norm_window_size": 10,
        "grad_norm_threshold_ratio": 0.7,
        "variance_min": None,
        "variance_max": None,
    }
    return SimpleNamespace(**(values | options))


def run(stopper, losses=(), norms=(), variances=()):
    """Feed one series after the other position by position; the answers."""
    length = max(len(losses), len(norms), len(variances))
    answers = []
    for i in range(length):
        metrics = {}
        for name, series in (("loss", losses), ("grad_norm", norms), ("value_variance", variances)):
            if i < len(series):
                metrics[name] = series[i]
        answers.append(stopper.should_stop(metrics))
    return answers


# By hand


def test_converged_after_patience_checks_without_improvement():
    stopper = EarlyStopping(config())
    assert run(stopper, losses=[1.0, 0.9, 0.95, 0.9, 0.91]) == [False, False, False, False, True]
    assert stopper.best_value == 0.9
    assert stopper.counter == 3
    assert stopper.stop_reason == "converged: loss has not improved by 0 for 3 checks (best 0.9)"


def test_an_improvement_smaller_than_min_delta_is_none():
    stopper = EarlyStopping(config(min_delta=0.25, patience=2))
    # 0.875 is less than 0.25 below 1.0; 0.5 is more than that.
    assert run(stopper, losses=[1.0, 0.875, 0.5, 0.375, 0.25]) == [False, False, False, False, True]
    assert stopper.best_value == 0.5


def test_small_improvements_add_up():
    """They are counted from the best value, so a slow but steady fall is an improvement."""
    stopper = EarlyStopping(config(min_delta=0.25, patience=3))
    assert run(stopper, losses=[1.0, 0.875, 0.75, 0.625, 0.5, 0.375]) == [False] * 6


def test_a_constant_loss_converges_also_without_min_delta():
    assert run(EarlyStopping(config(patience=1)), losses=[1.0, 1.0]) == [False, True]


def test_unstable_needs_a_full_window_and_the_ratio():
    stopper = EarlyStopping(config(grad_norm_window_size=4, grad_norm_threshold_ratio=0.5))
    assert run(stopper, norms=[99, 99, 99, 1, 1, 1, 50, 50.1, 51]) == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert stopper.stop_reason == "unstable: 2 of the last 4 gradient norms exceed 50"


def test_a_ratio_is_met_exactly():
    """55 of 100 is 0.55, which 0.55 * 100 = 55.00000000000001 would miss."""
    stopper = EarlyStopping(config(grad_norm_window_size=100, grad_norm_threshold_ratio=0.55))
    assert run(stopper, norms=[1.0] * 45 + [99.0] * 55)[-1]
    stopper = EarlyStopping(config(grad_norm_window_size=100, grad_norm_threshold_ratio=0.55))
    assert not any(run(stopper, norms=[1.0] * 46 + [99.0] * 54))


def test_variance_outside_the_bounds():
    assert run(EarlyStopping(config(variance_min=0.01)), variances=[0.01, 0.0]) == [False, True]
    stopper = EarlyStopping(config(variance_max=0.2))
    assert run(stopper, variances=[0.2, 0.0, 0.21]) == [False, False, True]
    assert stopper.stop_reason == ("out of range: the variance of the predicted values is 0.21, outside [-inf, 0.2]")
    assert not any(run(EarlyStopping(config()), variances=[0.0, 1e9, math.nan]))


def test_all_stops_when_converged_while_stable_and_in_range():
    options = {"mode": "all", "patience": 1, "grad_norm_window_size": 1, "variance_max": 0.2}
    assert run(EarlyStopping(config(**options)), [1, 1], [1, 1], [0.1, 0.1]) == [False, True]
    assert run(EarlyStopping(config(**options)), [1, 1], [1, 99], [0.1, 0.1]) == [False, False]
    assert run(EarlyStopping(config(**options)), [1, 1], [1, 1], [0.1, 0.3]) == [False, False]
    assert run(EarlyStopping(config(**options)), [1, 0], [1, 1], [0.1, 0.1]) == [False, False]
    # Only the loss counts towards convergence: it stops as soon as the gradient has calmed down.
    assert run(EarlyStopping(config(**options)), [1, 1, 1], [99, 99, 1]) == [False, False, True]


def test_loss_only_ignores_the_rest():
    options = {"mode": "loss_only", "patience": 2, "grad_norm_window_size": 1, "variance_max": 0.2}
    assert run(EarlyStopping(config(**options)), [1, 0, 0, 0], [99] * 4, [9] * 4) == [False, False, False, True]


def test_off_means_off():
    stopper = EarlyStopping(config(enabled=False, patience=1, grad_norm_window_size=1))
    assert run(stopper, [1.0] * 5, [999.0] * 5) == [False] * 5
    assert (stopper.stop_reason, stopper.best_value, stopper.counter) == (None, None, 0)


@pytest.mark.parametrize("none", [math.nan, INF])
def test_a_loss_that_is_no_number_is_no_improvement(none):
    stopper = EarlyStopping(config(patience=2))
    assert run(stopper, losses=[none, 1.0, none, 0.5, none, none]) == [False] * 5 + [True]
    assert stopper.best_value == 0.5
    stopper = EarlyStopping(config(patience=2))
    assert run(stopper, losses=[none, none]) == [False, True]
    assert stopper.stop_reason == "converged: loss has not improved by 0 for 2 checks (no finite value yet)"


def test_minus_infinity_is_never_the_best():
    stopper = EarlyStopping(config())
    run(stopper, losses=[-INF, 1.0])
    assert stopper.best_value == 1.0


@pytest.mark.parametrize("none", [math.nan, INF])
def test_a_norm_that_is_no_number_exceeds(none):
    assert run(EarlyStopping(config(grad_norm_window_size=1)), norms=[1.0, none]) == [False, True]
    assert run(EarlyStopping(config(variance_min=0.0)), variances=[1.0, none]) == [False, True]


def test_a_missing_metric_changes_nothing():
    stopper = EarlyStopping(config(monitor="value_loss", patience=1, grad_norm_window_size=2))
    stopper.should_stop({"value_loss": 1.0, "grad_norm": 99.0})
    for _ in range(5):
        assert not stopper.should_stop({"loss": 1.0})
    assert stopper.counter == 0
    assert stopper.should_stop({"value_loss": 1.0})


def test_the_reason_is_gone_when_the_cause_is():
    stopper = EarlyStopping(config(grad_norm_window_size=1))
    assert run(stopper, norms=[99.0, 1.0]) == [True, False]
    assert stopper.stop_reason is None


def test_state_of_another_monitor_and_window():
    first = EarlyStopping(config(monitor="loss"))
    run(first, losses=[1.0, 1.0], norms=[1.0, 2.0])
    other = EarlyStopping(config(monitor="value_loss", grad_norm_window_size=1))
    other.load_state_dict(first.state_dict())
    assert (other.best_value, other.counter) == (None, 0)
    assert other.state_dict()["grad_norms"] == [2.0]
    with pytest.raises(KeyError):
        other.load_state_dict({"monitor": "loss"})


@pytest.mark.parametrize("stage", ["baseline", "critic", "verifiable", "rho1"])
def test_the_config_class_fits(stage):
    from wmtp_ds.config.schema import EarlyStoppingConfig
    from wmtp_ds.config.training import training_class

    table = EarlyStoppingConfig(**training_class(stage).default_early_stopping, enabled=True)
    expected = ("value_loss", 10, 1e-4) if stage == "critic" else ("loss", 100, 1e-5)
    assert (table.monitor, table.patience, table.min_delta) == expected
    assert (table.mode, table.grad_norm_window_size, table.grad_norm_threshold_ratio) == ("any", 10, 0.7)
    stopper = EarlyStopping(table)
    answers = [stopper.should_stop({table.monitor: 1.0}) for _ in range(table.patience + 1)]
    assert answers == [False] * table.patience + [True]


# Against brute force: at every step the answer is worked out anew from the whole history.

numbers = st.one_of(st.integers(-8, 8).map(float), st.just(math.nan), st.just(INF))
norms = st.one_of(st.integers(0, 6).map(float), st.just(math.nan), st.just(INF))
histories = st.lists(
    st.fixed_dictionaries({}, optional={"loss": numbers, "grad_norm": norms, "value_variance": norms}), max_size=30
)
configs = st.builds(
    config,
    mode=st.sampled_from(["any", "all", "loss_only"]),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 1.0, 2.5]),
    grad_norm_threshold=st.integers(1, 5).map(float),
    grad_norm_window_size=st.integers(1, 5),
    grad_norm_threshold_ratio=st.sampled_from([0.2, 0.5, 0.7, 0.75, 1.0]),
    variance_min=st.one_of(st.none(), st.just(1.0)),
    variance_max=st.one_of(st.none(), st.just(4.0)),
)


def oracle(options, history):
    """Whether to stop after ``history``, from the wording alone."""
    losses = [metrics["loss"] for metrics in history if "loss" in metrics]
    # The last check that improved: its loss is finite and undercuts, by more than min_delta, the last such one.
    improved, last = None, -1
    for i, loss in enumerate(losses):
        if math.isfinite(loss) and (improved is None or improved - loss > options.min_delta):
            improved, last = loss, i
    converged = len(losses) - 1 - last >= options.patience

    seen = [metrics["grad_norm"] for metrics in history if "grad_norm" in metrics]
    window = seen[len(seen) - options.grad_norm_window_size :] if len(seen) >= options.grad_norm_window_size else []
    exceeding = [norm for norm in window if math.isnan(norm) or norm > options.grad_norm_threshold]
    ratio = Fraction(str(options.grad_norm_threshold_ratio))
    unstable = bool(window) and Fraction(len(exceeding), len(window)) >= ratio

    variance = history[-1].get("value_variance")
    bounds = (options.variance_min, options.variance_max)
    outside = False
    if variance is not None and bounds != (None, None):
        low, high = -INF if bounds[0] is None else bounds[0], INF if bounds[1] is None else bounds[1]
        outside = not (math.isfinite(variance) and low <= variance <= high)

    if options.mode == "any":
        return converged or unstable or outside
    if options.mode == "all":
        return converged and not unstable and not outside
    return converged


@settings(max_examples=400, deadline=None)
@given(options=configs, history=histories)
def test_agrees_with_brute_force(options, history):
    stopper = EarlyStopping(options)
    for i, metrics in enumerate(history):
        assert stopper.should_stop(metrics) is oracle(options, history[: i + 1])
        assert (stopper.stop_reason is not None) == oracle(options, history[: i + 1])


@settings(max_examples=200, deadline=None)
@given(options=configs, history=histories, cut=st.integers(0, 30))
def test_a_resume_makes_no_difference(options, history, cut):
    whole, before = EarlyStopping(options), EarlyStopping(options)
    for metrics in history[:cut]:
        assert whole.should_stop(metrics) == before.should_stop(metrics)
    after = EarlyStopping(options)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert (after.stop_reason, after.counter, after.best_value) == (
        before.stop_reason,
        before.counter,
        before.best_value,
    )
    for metrics in history[cut:]:
        assert whole.should_stop(metrics) == after.should_stop(metrics)
        assert whole.stop_reason == after.stop_reason
