"""The measures of an equity curve against empyrical-reloaded, which zipline and pyfolio use."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from train.evaluate.measures import DAY_MS, YEAR_DAYS, daily_returns, drawdown, measure_equity, sharpe, sortino

RETURNS = arrays(np.float64, st.integers(180, 400), elements=st.integers(-2_000, 2_500).map(lambda x: x / 10_000))
"""Daily, from -20 % to +25 %, in whole basis points."""


def make_equity(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return one value at each UTC midnight, and its times."""
    return np.arange(len(returns) + 1) * DAY_MS, 1e4 * np.cumprod(np.append(1.0, 1 + returns))


@given(RETURNS)
@settings(max_examples=60, deadline=None)
def test_measures_are_those_of_empyrical(returns):
    empyrical = pytest.importorskip("empyrical", reason="needs pip install empyrical-reloaded")
    times, equity = make_equity(returns)
    assume(returns.std() > 1e-6 and (returns < 0).any())
    np.testing.assert_allclose(daily_returns(times, equity), returns, rtol=0, atol=1e-12)
    found = measure_equity(times, equity)
    wanted = {
        "return": empyrical.cum_returns_final(returns),
        "volatility": empyrical.annual_volatility(returns, annualization=YEAR_DAYS),
        "sharpe": empyrical.sharpe_ratio(returns, annualization=YEAR_DAYS),
        "sortino": empyrical.sortino_ratio(returns, annualization=YEAR_DAYS),
        "max_drawdown": -empyrical.max_drawdown(returns),
        "annual_return": empyrical.annual_return(returns, annualization=YEAR_DAYS),
        "calmar": empyrical.calmar_ratio(returns, annualization=YEAR_DAYS),
    }
    assert not found["absent"] and found["days"] == len(returns)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-8, abs=1e-9), name


@given(RETURNS, st.floats(1e-3, 10))
@settings(max_examples=30, deadline=None)
def test_ratios_do_not_depend_on_leverage(returns, leverage):
    assume(returns.std() > 1e-6 and (returns < 0).any())
    assert sharpe(leverage * returns)[0] == pytest.approx(sharpe(returns)[0], rel=1e-6, abs=1e-9)
    assert sortino(leverage * returns) == pytest.approx(sortino(returns), rel=1e-6, abs=1e-9)


@given(RETURNS)
@settings(max_examples=30, deadline=None)
def test_the_longest_drawdown_is_that_of_a_plain_loop(returns):
    _, equity = make_equity(returns)
    longest = under = 0
    for i, value in enumerate(equity):
        under = under + 1 if value < equity[: i + 1].max() else 0
        longest = max(longest, under)
    assert drawdown(equity)[1] == longest
