"""A venue's numbers of contracts, from its files: Binance's exchangeInfo and leverage brackets, ccxt's markets."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from perpjax.data.contract import DataError
from perpjax.instrument import EXACT


class Contract(NamedTuple):
    """Numbers of one contract; None where the files do not say."""

    tick_size: float | None = None
    step_size: float | None = None
    min_notional: float | None = None
    max_quantity: float | None = None
    brackets: tuple[tuple[float, ...], ...] | None = None
    """Rows of (floor, cap, max leverage, maintenance rate, maintenance amount)."""

    def merge(self, other: "Contract") -> "Contract":
        """Return both together; the other's numbers count first."""
        return Contract(*(b if b is not None else a for a, b in zip(self, other, strict=True)))

    def numbers(self) -> dict[str, Any]:
        """Return the fields of `Instrument` that are known."""
        known = {name: value for name, value in self._asdict().items() if value is not None}
        if "step_size" in known:
            known["max_quantity"] = min(known.get("max_quantity", math.inf), EXACT * known["step_size"])
        return known


def read_contracts(paths: Sequence[Path]) -> dict[str, Contract]:
    """Read the contracts of some JSON files, by symbol such as BTCUSDT.

    Three forms are read: the answer of Binance's `exchangeInfo`, the list of its `leverageBracket`, and the markets of
    ccxt (a list, or a dictionary by symbol).

    Raises:
      DataError: a file is missing or has another form. The message names it.
    """
    contracts: dict[str, Contract] = {}
    for path in paths:
        try:
            data = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check --instruments") from None
        except ValueError as error:
            raise DataError(
                f"{path}: is not JSON ({error}); give exchangeInfo, leverageBracket or ccxt markets"
            ) from None
        found = dict(_read_contracts(data, path))
        if not found:
            raise DataError(f"{path}: names no contract; give Binance's exchangeInfo, leverageBracket or ccxt markets")
        for symbol, contract in found.items():
            contracts[symbol] = contracts.get(symbol, Contract()).merge(contract)
    return contracts


def _read_contracts(data: Any, path: Path) -> Iterator[tuple[str, Contract]]:
    if isinstance(data, Mapping) and isinstance(data.get("symbols"), list):
        rows, parse = data["symbols"], _parse_binance
    elif isinstance(data, Mapping) and "brackets" in data:
        rows, parse = [data], _parse_brackets
    elif isinstance(data, list) and data and isinstance(data[0], Mapping) and "brackets" in data[0]:
        rows, parse = data, _parse_brackets
    else:
        rows, parse = list(data.values()) if isinstance(data, Mapping) else data, _parse_ccxt
    if not isinstance(rows, list):
        return
    for i, row in enumerate(rows):
        try:
            symbol, contract = parse(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: row {i}: is not a contract ({error!r}); download the file again") from None
        if symbol is not None:
            yield symbol, contract


def _parse_binance(row: Mapping[str, Any]) -> tuple[str | None, Contract]:
    if row.get("contractType") not in (None, "PERPETUAL"):
        return None, Contract()
    filters = {f["filterType"]: f for f in row["filters"]}
    lot = filters.get("MARKET_LOT_SIZE", {}) | {"stepSize": filters["LOT_SIZE"]["stepSize"]}
    notional = filters.get("MIN_NOTIONAL", filters.get("NOTIONAL", {}))
    return str(row["symbol"]), Contract(
        tick_size=_positive(filters["PRICE_FILTER"]["tickSize"]),
        step_size=_positive(lot["stepSize"]),
        min_notional=_number(notional.get("notional", notional.get("minNotional"))),
        max_quantity=_number(lot.get("maxQty")) or None,
    )


def _parse_brackets(row: Mapping[str, Any]) -> tuple[str | None, Contract]:
    brackets = sorted(
        (
            float(b["notionalFloor"]), float(b["notionalCap"]), float(b["initialLeverage"]),
            float(b["maintMarginRatio"]), float(b.get("cum", 0)),
        )
        for b in row["brackets"]
    )  # fmt: skip
    return str(row["symbol"]), Contract(brackets=tuple(brackets))


def _parse_ccxt(row: Mapping[str, Any]) -> tuple[str | None, Contract]:
    if not row.get("swap") or row.get("linear") is False:
        return None, Contract()
    precision, limits = row.get("precision") or {}, row.get("limits") or {}
    size = _number(row.get("contractSize")) or 1.0
    step, most = _number(precision.get("amount")), _number((limits.get("market") or {}).get("max"))
    most = most or _number((limits.get("amount") or {}).get("max"))
    symbol = f"{row['base']}{row['quote']}".replace("/", "").upper()
    return symbol, Contract(
        tick_size=_number(precision.get("price")),
        step_size=None if step is None else step * size,
        min_notional=_number((limits.get("cost") or {}).get("min")),
        max_quantity=None if not most else most * size,
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _positive(value: Any) -> float:
    number = float(value)
    if not number > 0:
        raise ValueError(f"{value!r} is not positive")
    return number
