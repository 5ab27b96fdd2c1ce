"""The reasons of a result, in words. Each rule reads the figures of evaluation.json and returns a sentence, or None."""

import math
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
Rule = Callable[[Record], str | None]

MANY_LOTS_A_DAY = 8
LARGE_SHARE = 0.05
OUTSIDE = 0.01
SELDOM = 0.01
"""Share of the bars with an order, up to which a policy that never trades mostly does not want to."""
MANY_DAYS = 90
ALIKE = 1.2
"""Most lots for which a drawn lot stands, where draws and policy pay about the same costs."""


def diagnose(record: Record) -> list[dict[str, str]]:
    """Return the rules that speak, the gravest first, with their sentences."""
    said = ((rule.__name__, rule(record)) for rule in RULES)
    return [{"rule": name, "text": text} for name, text in said if text]


def never_trades(record: Record) -> str | None:
    """Without a lot: orders that were refused, or the edge of the orders that it draws when it explores."""
    if record["lots"]["lots"]:
        return None
    refused = {name: n for name, n in record["verdicts"].items() if name not in ("HOLD", "ACCEPTED")}
    begin = "It never trades."
    if refused:
        name, most = max(refused.items(), key=lambda item: item[1])
        orders = f"{sum(refused.values()):,} orders were all refused, {most:,} of them as {name}"
        begin = f"It never trades: its {orders}{_REFUSALS.get(name, '')}."
        if sum(refused.values()) > SELDOM * sum(record["verdicts"].values()):
            return begin
    cost = record["round_trip"]["typical_cost"]
    text = f"{begin} A round trip costs about {cost:.0f} bp here"
    explored = record["round_trip"].get("explored_gross")
    if explored is None:
        return text + "."
    lots = record["round_trip"]["explored_lots"]
    verb = f"earn {explored:.1f} bp" if explored >= 0 else f"lose {-explored:.1f} bp"
    drawn = f"the entries that it draws when it explores {verb} before costs ({lots:,} lots)"
    if explored <= 0:
        return f"{text}, and {drawn}: there is no edge to pay for."
    return f"{text}, and {drawn}: {'too little' if explored < cost else 'enough, so it stopped learning too early'}."


_REFUSALS = {
    "BELOW_MINIMUM": " (the order is smaller than the venue's minimum: raise initial_equity or max_exposure)",
    "MAX_NOTIONAL": " (larger than the last bracket)",
    "DATA_GAP": " (the first candle of the bar is missing)",
}


def ruined(record: Record) -> str | None:
    """An account that ended before its segment, or many liquidations."""
    over = [f"{a['name']} after {a['days']:.0f} days" for a in record["accounts"] if a["ended"] == "ruin"]
    if over:
        return f"Ruin ended the account of {', '.join(over)}."
    exits = record["lots"].get("exits", {})
    share = exits.get("liquidated", 0) / max(1, record["lots"]["lots"])
    if share > 0.05:
        return f"{100 * share:.0f} % of its lots are liquidated: the margin is too thin for the stops it sets."
    return None


def has_no_edge(record: Record) -> str | None:
    """A gross loss: the entries lose before costs."""
    trip = record["round_trip"]
    if record["waterfall"]["net"] >= 0 or trip.get("gross", 1) > 0:
        return None
    gross, cost = trip["gross"], trip["cost"]
    return f"Its entries lose {-gross:.1f} bp a round trip before costs, and the costs take another {cost:.1f} bp."


def costs_exceed_edge(record: Record) -> str | None:
    """A gross profit that is smaller than the costs."""
    trip = record["round_trip"]
    if record["waterfall"]["net"] >= 0 or not 0 < trip.get("gross", 0) < trip.get("cost", 0):
        return None
    return f"A round trip costs {trip['cost']:.1f} bp here, and its entries earn {trip['gross']:.1f} bp before costs."


def funding_takes_the_profit(record: Record) -> str | None:
    """A profit after costs that funding, or liquidations, turn into a loss."""
    trip = record["round_trip"]
    if record["waterfall"]["net"] >= 0 or not 0 < trip.get("cost", 0) <= trip.get("gross", 0):
        return None
    return (
        f"Its entries earn {trip['gross']:.1f} bp a round trip before costs of {trip['cost']:.1f} bp, but "
        f"funding{_liquidations(trip)} takes {_other(trip):.1f} bp."
    )


def _other(trip: dict[str, float]) -> float:
    return trip["funding"] + trip["liquidation"]


def _liquidations(trip: dict[str, float]) -> str:
    return " with liquidations" if trip["liquidation"] > 0.1 else ""


def trades_too_much(record: Record) -> str | None:
    """Many lots a day, with costs that take most of the gross profit."""
    lots, waterfall = record["lots"], record["waterfall"]
    if not lots["lots"]:
        return None
    a_day, paid = lots["lots_a_week"] / 7, -(waterfall["slippage"] + waterfall["fees"])
    if a_day < MANY_LOTS_A_DAY or paid < 0.5 * waterfall["gross"]:
        return None
    part = f"{100 * paid / waterfall['gross']:.0f} % of the gross profit" if waterfall["gross"] > 0 else f"{paid:,.0f}"
    return f"It trades {a_day:.1f} lots a day of {lots['mean_bars']:.1f} bars each, and fees and slippage take {part}."


def lives_on_few_lots(record: Record) -> str | None:
    """A profit that is gone without its three best lots."""
    lots, net = record["lots"], record["waterfall"]["net"]
    if lots["lots"] < 6 or net <= 0 or lots["best_three_net"] < net:
        return None
    return f"It lives on three lots: without the best three of {lots['lots']:,} the profit of {net:,.0f} is a loss."


def trades_one_side(record: Record) -> str | None:
    """Lots of one side only, in a market that moved that way."""
    lots = record["lots"]
    if lots["lots"] < 10:
        return None
    share = lots["long"] / lots["lots"]
    if 0.05 < share < 0.95:
        return None
    side, market = ("long" if share > 0.5 else "short"), record["market_return"]
    way = "with" if (market > 0) == (share > 0.5) else "against"
    return f"It only goes {side}, {way} a market that moved {100 * market:+.1f} %."


def lives_on_one_month(record: Record) -> str | None:
    """A profit that is gone without its best month."""
    months, whole = record["months"], record["overall"]["return"]
    if len(months) < 3 or whole <= 0:
        return None
    best = max(months, key=lambda month: month["return"])
    if best["return"] < whole:
        return None
    return f"It lives on one month: {best['month']} made {100 * best['return']:+.1f} %, and the others lost."


def ends_with_open_lots(record: Record) -> str | None:
    """Lots still open at the end that carry much of the result."""
    lots, net = record["lots"], record["waterfall"]["net"]
    held = lots.get("exits", {}).get("open", 0)
    if not held or abs(lots["open_net"]) < 0.25 * abs(net):
        return None
    part = f"{lots['open_net']:+,.0f} of the {net:+,.0f}"
    return f"{held} of its lots are still open at the end, and {part} are not yet realised."


def earns_by_funding(record: Record) -> str | None:
    """A profit that funding pays."""
    waterfall = record["waterfall"]
    if waterfall["net"] <= 0 or waterfall["funding"] < 0.5 * waterfall["net"]:
        return None
    return f"It earns by funding: {waterfall['funding']:+,.0f} of a profit of {waterfall['net']:+,.0f}."


def depends_on_speed(record: Record) -> str | None:
    """A profit that shrinks, or a loss that shrinks, if every decision comes one bar later."""
    late = next((x for x in record["stresses"] if x["name"] == "one bar later"), None)
    if not late or not late["interval"] or late["interval"][0] <= 0 <= late["interval"][1]:
        return None
    gain, moved = record["overall"]["return"], f"{100 * late['return']:+.1f} % instead of"
    if late["difference"] > 0:
        return (
            f"With every decision one bar later it makes {moved} {100 * gain:+.1f} %: the timing of its entries costs."
        )
    if gain <= 0 or late["return"] > 0.5 * gain:
        return None
    return f"It needs speed: with every decision one bar later it makes {moved} {100 * gain:+.1f} %."


def lacks_funding(record: Record) -> str | None:
    """Data without a settlement of funding."""
    if record["data"]["settlements"] or not record["lots"]["lots"]:
        return None
    return "The data hold no funding, so every figure leaves it out."


def sees_the_unknown(record: Record) -> str | None:
    """Observations far outside the training split."""
    far = [x for x in record["actions"] if x["outside"] > OUTSIDE]
    if not far:
        return None
    worst = max(far, key=lambda x: x["outside"])
    more = f" and {len(far) - 1} more" if len(far) > 1 else ""
    return (
        f"In {100 * worst['outside']:.1f} % of the bars {worst['feature']}{more} lies more than 6 standard deviations "
        "from the training split's mean: there the policy guesses."
    )


def is_too_large(record: Record) -> str | None:
    """Entries that the volume of their bars could not have filled at these prices."""
    volume = record["volume"]
    if volume.get("largest_share", 0) < 2 * LARGE_SHARE and volume.get("median_share", 0) < LARGE_SHARE / 5:
        return None
    return (
        f"Its entries take {100 * volume['median_share']:.3g} % of the traded value of their bars in the median and "
        f"{100 * volume['largest_share']:.3g} % at most: real fills would be worse."
    )


def refuses_many(record: Record) -> str | None:
    """Orders that are refused more often than accepted."""
    verdicts = record["verdicts"]
    accepted = verdicts.get("ACCEPTED", 0)
    refused = {name: n for name, n in verdicts.items() if name not in ("HOLD", "ACCEPTED")}
    total = sum(refused.values())
    if not record["lots"]["lots"] or total <= 3 * accepted:
        return None
    name, most = max(refused.items(), key=lambda item: item[1])
    return f"{total:,} of {total + accepted:,} orders are refused, {most:,} as {name}{_REFUSALS.get(name, '')}."


RULES: tuple[Rule, ...] = (
    ruined, never_trades, has_no_edge, costs_exceed_edge, funding_takes_the_profit, trades_too_much, lives_on_few_lots,
    lives_on_one_month, trades_one_side, is_too_large, lacks_funding, ends_with_open_lots, earns_by_funding,
    depends_on_speed, sees_the_unknown, refuses_many,
)  # fmt: skip
"""The gravest first."""


def write_verdict(record: Record) -> list[str]:
    """Return three sentences: the result, its reason, and its weight."""
    return [_tell_result(record), _tell_reason(record), _tell_weight(record)]


def _tell_result(record: Record) -> str:
    overall, data = record["overall"], record["data"]
    split = f"the {data['split']} split of {data['dataset']}" if data["split"] else data["dataset"]
    gain, low_high = overall["return"], overall["intervals"].get("return")
    verb = "gained" if gain > 0 else "lost"
    moved = f"{verb} {abs(100 * gain):.1f} %" if gain else "stayed where it was"
    spread = f" (90 % interval {100 * low_high[0]:+.1f} to {100 * low_high[1]:+.1f} %)" if low_high and gain else ""
    return (
        f"In {overall['days']:.0f} days of {split} the account {moved}{spread}, with a drawdown of "
        f"{100 * overall['max_drawdown']:.1f} %, while the market moved {100 * record['market_return']:+.1f} %."
    )


def _tell_reason(record: Record) -> str:
    reasons = [x["text"] for x in record["diagnosis"]]
    if record["lots"]["lots"] and (record["waterfall"]["net"] > 0 or not reasons):
        trip, lots = record["round_trip"], record["lots"]
        earned = f"earn {trip['gross']:.1f} bp each before costs and pay {trip['cost']:.1f} bp of fees and slippage"
        other = _other(trip)
        funding = f", and {'pay' if other > 0 else 'receive'} {abs(other):.1f} bp of funding{_liquidations(trip)}"
        return f"Its {lots['lots']:,} round trips {earned}{funding if abs(other) >= 0.1 else ''}."
    return reasons[0] if reasons else "No rule of the diagnosis speaks."


def _tell_weight(record: Record) -> str:
    overall, random = record["overall"], record["random"]
    alike = random.get("lots_per_spell", math.inf) < ALIKE
    luck = (
        f"; {100 * random['place']:.0f} % of random traders with its rate, sides and sizes did worse" if alike else ""
    )
    if not record["lots"]["lots"]:
        return "Without a trade there is nothing to believe or to doubt."
    interval = overall["intervals"].get("return")
    if interval is None:
        return f"{overall['days']:.0f} days are too few to tell skill from luck{luck}."
    market = "" if overall["days"] >= MANY_DAYS else f", but {overall['days']:.0f} days are one market and not many"
    if interval[0] > 0:
        return f"The interval excludes zero{market}{luck}; look at the number of trials before you believe it."
    if interval[1] < 0:
        return f"The interval excludes zero{market}{luck}."
    return f"The interval includes zero, so the result is no evidence of skill{luck}."
