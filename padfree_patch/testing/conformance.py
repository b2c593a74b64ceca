"""Checks and oracle under one name."""

from .checks import (
    CHECKS,
    FAIL_UNPATCHED,
    LENGTHS,
    allowed_syncs,
    check_cost,
    check_gradients,
    check_isolation,
    check_logits,
    check_ordinary_calls,
    check_router_losses,
    check_rows,
    check_two_forwards,
    syncs_of,
)
from .labelled import check_labelled_logits, completions
from .models import checkpointing
from .oracle import (
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    Make,
    alone_loss_and_gradients,
    as_batch,
    assert_gradients_close,
    assert_logits_close,
    largest,
    logits_alone,
)
from .ordinary import assert_identical, ordinary_results

__all__ = [
    "CHECKS",
    "FAIL_UNPATCHED",
    "GRADIENT_TOLERANCE",
    "LENGTHS",
    "LOGIT_TOLERANCE",
    "Make",
    "allowed_syncs",
    "alone_loss_and_gradients",
    "as_batch",
    "assert_gradients_close",
    "assert_identical",
    "assert_logits_close",
    "check_cost",
    "check_gradients",
    "check_isolation",
    "check_labelled_logits",
    "check_logits",
    "check_ordinary_calls",
    "check_router_losses",
    "check_rows",
    "check_two_forwards",
    "checkpointing",
    "completions",
    "largest",
    "logits_alone",
    "ordinary_results",
    "syncs_of",
]
