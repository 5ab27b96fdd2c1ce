"""Indicators and the core feature set."""

from perpjax.data.grid import append_next_bar
from perpjax.features.core import (
    CORE_FEATURES,
    LIVE_BARS,
    LIVE_TOLERANCE,
    WARMUP_BARS,
    core_features,
    core_features_live,
    price_features,
)

__all__ = [
    "CORE_FEATURES", "LIVE_BARS", "LIVE_TOLERANCE", "WARMUP_BARS", "append_next_bar", "core_features",
    "core_features_live", "price_features",
]  # fmt: skip
