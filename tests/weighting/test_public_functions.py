"""The signatures that users and notebooks rely on."""

import inspect

import pytest

import wmtp_ds.weighting as weighting

SIGNATURES = {
    "compute_td_errors": "(value_logits, rewards, gamma=1.0, attention_mask=None)",
    "compute_gae": "(value_logits, rewards, gamma=1.0, lam=0.95, attention_mask=None)",
    "build_weights": "(td_errors, beta=0.9, min_weight=0.1, max_weight=5.0)",
    "compute_td_stats": "(td_errors, mask=None)",
    "compute_weight_stats": "(weights, mask=None)",
    "select_topk": "(excess, mask, k_percent, scope='batch')",
}


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_names_order_and_defaults(name):
    signature = inspect.signature(getattr(weighting, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_nothing_else_is_public():
    assert sorted(weighting.__all__) == sorted(SIGNATURES)
