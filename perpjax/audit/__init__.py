"""What to ask of a good result: did a feature or the environment look ahead, and does it hang on candles' paths?"""

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
