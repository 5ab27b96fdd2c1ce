"""Market data: the schemas of the tables, the builder, datasets on disk and synthetic markets."""

from perpjax.data.builder import build_market
from perpjax.data.contract import CANDLES, FUNDING, MARK, DataError, read_table, validate
from perpjax.data.dataset import load_market
from perpjax.data.scaler import Scaler, fit_scaler
from perpjax.data.synthetic import synthetic_tables

__all__ = [
    "CANDLES",
    "FUNDING",
    "MARK",
    "DataError",
    "Scaler",
    "build_market",
    "fit_scaler",
    "load_market",
    "read_table",
    "synthetic_tables",
    "validate",
]
