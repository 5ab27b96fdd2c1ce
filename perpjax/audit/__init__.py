"""Checks of a good result: look-ahead in features or environment, and dependence on the path inside candles."""

from perpjax.audit.environment import audit_env
from perpjax.audit.features import audit_features
from perpjax.audit.path import PathSensitivity, Play, path_sensitivity
from perpjax.audit.report import Audit, Item, Movement

__all__ = [
    "Audit",
    "Item",
    "Movement",
    "PathSensitivity",
    "Play",
    "audit_env",
    "audit_features",
    "path_sensitivity",
]
