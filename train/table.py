"""The table at the end of a run."""

import math

from rich.markup import escape
from rich.table import Table

from train.evaluate import Result, t_statistic

_CAPTION = (
    "Means of an episode; %: of initial equity (drawdown: of the peak). t: mean return over its standard error; "
    "{} against random: {}. liq.: lots liquidated. Return % if the lots still open were closed: {}."
)

_CHOSEN = " best was chosen on this split, so its figures are too good; final was not."


def _show(form: str, value: float) -> str:
    """The number, or a dash where it has no value."""
    return form.format(value) if math.isfinite(value) else "-"


def make_table(results: dict[str, Result], title: str) -> Table:
    """Return a table with one row for each policy.

    Args:
      results: by the policy's name, on the same windows; the first and `random` are compared.
      title: above the table.
    """
    first = next(iter(results))
    closed = ", ".join(f"{name} {100 * r.closed_returns.mean():+.3f}" for name, r in results.items())
    against = _show("{:+.1f}", t_statistic(results[first].returns - results["random"].returns))
    table = Table(
        title=escape(title),
        title_justify="left",
        caption_justify="left",
        caption=_CAPTION.format(first, against, closed) + _CHOSEN * (first == "best"),
    )
    table.add_column("policy", no_wrap=True)
    heads = ("return %", "± s.e.", "t", "drawdown %", "trades", "fees %", "liq.")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, r in results.items():
        error = r.returns.std(ddof=1) / len(r.returns) ** 0.5 if len(r.returns) > 1 else float("nan")
        table.add_row(
            name,
            f"{100 * r.returns.mean():+.3f}",
            _show("{:.3f}", 100 * error),
            _show("{:+.1f}", r.t_stat()),
            f"{100 * r.max_drawdown.mean():.2f}",
            f"{r.trades.mean():.1f}",
            f"{100 * r.fees.mean():.3f}",
            f"{r.liquidations.mean():.2f}",
        )
    return table
