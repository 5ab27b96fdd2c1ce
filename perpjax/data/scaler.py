"""The standard scaler of the features: plain numbers by name, fitted only on the training split."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from perpjax.market import Market


class Scaler(NamedTuple):
    """A standard scaler: `(x - mean) / scale`, feature by feature."""

    names: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray


def fit_scaler(market: Market, rows: Sequence[int] | np.ndarray) -> Scaler:
    """Fit mean and population standard deviation of the features of some rows, in float64.

    A constant feature gets scale 1: its deviation is below 1e-12 of its mean, or below the smallest normal float32.

    Args:
      rows: bars t of the fitted `features[t]`: the decision bars of the training split and no others.

    Raises:
      ValueError: there are no rows, rows lie outside the market, or a value is not finite.
    """
    return fit_scaler_on([(market, rows)])


def fit_scaler_on(parts: Sequence[tuple[Market, Sequence[int] | np.ndarray]]) -> Scaler:
    """Fit as `fit_scaler`, on rows of several markets with the same features."""
    chosen = []
    for market, rows in parts:
        if len(rows) == 0 or min(rows) < 0 or max(rows) >= len(market.rows):
            raise ValueError(f"a scaler cannot be fitted on rows {rows} of a market of {len(market.rows)} rows")
        chosen.append(np.asarray(market.features, np.float64)[np.asarray(rows)])
    x, market = np.concatenate(chosen), parts[0][0]
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    if not (np.isfinite(mean) & np.isfinite(deviation)).all():
        raise ValueError("a scaler cannot be fitted on rows with NaN: features before the first decision bar are NaN")
    constant = deviation <= np.maximum(1e-12 * np.abs(mean), float(np.finfo(np.float32).tiny))
    return Scaler(market.feature_names, mean, np.where(constant, 1.0, deviation))


def attach_scaler(market: Market, scaler: Scaler) -> Market:
    """Return the market with another scaler.

    Raises:
      ValueError: the scaler belongs to other features, or has a scale that is not positive.
    """
    scaler = choose_scaler(scaler, market.feature_names)
    return market.replace(
        scaler_mean=jnp.asarray(scaler.mean, jnp.float32), scaler_scale=jnp.asarray(scaler.scale, jnp.float32)
    )


def choose_scaler(scaler: Scaler | None, names: tuple[str, ...]) -> Scaler:
    """Return the scaler, checked against the features' names. None gives mean 0 and scale 1.

    Raises:
      ValueError: the scaler belongs to other features, or has a value that is not finite or a scale that is not
        positive.
    """
    if scaler is None:
        return Scaler(names, np.zeros(len(names)), np.ones(len(names)))
    if tuple(scaler.names) != names:
        differing = [pair for pair in zip(scaler.names, names, strict=False) if pair[0] != pair[1]]
        first = f"; the first that differ: {differing[0][0]!r} and {differing[0][1]!r}" if differing else ""
        raise ValueError(
            f"the scaler was fitted on {len(scaler.names)} features, the market has {len(names)}, and they are not "
            f"the same ones in the same order{first}"
        )
    mean, scale = np.asarray(scaler.mean, np.float64), np.asarray(scaler.scale, np.float64)
    if mean.shape != (len(names),) or scale.shape != (len(names),):
        raise ValueError(f"the scaler's shapes {mean.shape} and {scale.shape} are not ({len(names)},)")
    bad = ~(np.isfinite(mean) & np.isfinite(scale) & (scale > 0))
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(
            f"the scaler's mean {mean[i]} and scale {scale[i]} of {names[i]!r} are not finite, or not positive"
        )
    return Scaler(names, mean, scale)
