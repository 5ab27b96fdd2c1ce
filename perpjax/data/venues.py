"""Contracts with known numbers, and a guess for the others."""

import math

from perpjax.instrument import BRACKETS, EXACT, Instrument

KNOWN: dict[str, dict[str, float]] = {
    "BTCUSDT": dict(tick_size=0.1, step_size=0.001, min_notional=50.0, max_quantity=120.0),
    "ETHUSDT": dict(tick_size=0.01, step_size=0.001, min_notional=20.0, max_quantity=2_000.0),
}


def find_instrument(symbol: str, tick_size: float, median_close: float) -> tuple[Instrument, str]:
    """Return the instrument of a symbol, and a sentence about the source of its numbers.

    A symbol outside `KNOWN` gets a step of 10^-round(log10(median close)), about one unit of quote currency. It also
    gets the smallest minimum notional in use (5), the BTCUSDT brackets and no limit on the quantity but 2^24 - 1 steps.
    `tick_size` is the grid of the given prices. For a known symbol it may differ from today's (BTCUSDT: 0.01 in 2020).
    """
    brackets = BRACKETS.get(symbol, BRACKETS["BTCUSDT"])
    if symbol in KNOWN:
        numbers = KNOWN[symbol] | {"tick_size": tick_size}
        return Instrument(symbol, brackets=brackets, **numbers), f"{symbol}: known contract"
    step = float(f"1e{-round(math.log10(median_close))}")
    instrument = Instrument(symbol, tick_size, step, 5.0, EXACT * step, brackets=brackets)
    return instrument, (
        f"{symbol}: not a known contract; step {step:g} from the median close {median_close:g}, min_notional 5, "
        "BTCUSDT brackets; pass an Instrument for the venue's own numbers"
    )
