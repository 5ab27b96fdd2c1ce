"""`over_lots`: one rule for a lot, applied to all lots at once or slot by slot, says the same as a loop in Python."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perpjax.rules.lot_rule import LotRule
from perpjax.state import LOT_FIELDS, Lots, open_account
from perpjax.xla import Program, over_lots
from perpjax.xla.over_lots import NO_SLOT, Insert

SEVEN = [f"flag{i}" for i in range(7)]


class Found(NamedTuple):
    """Totals of every kind: a sum, maxima of floats and integers, and more flags than one word may hold."""

    sum: jax.Array
    highest: jax.Array
    oldest: jax.Array
    events: dict[str, jax.Array]

    MAXIMA = ("highest", "oldest")


@dataclasses.dataclass(frozen=True)
class Halve(LotRule):
    """Halves the quantity of a lot; one with less than 4 steps is gone."""

    price: jax.Array

    fields = LOT_FIELDS

    @property
    def decide(self):
        return self.halve, self.is_gone

    def halve(self, lot: Lots) -> jax.Array:
        return jnp.floor(lot.quantity / 2)

    def is_gone(self, lot: Lots, half: jax.Array) -> jax.Array:
        return half < 2

    def apply(self, lot: Lots, half: jax.Array, gone: jax.Array) -> tuple[Lots, Found]:
        held = lot.quantity > 0
        flags = {name: held & (lot.age % 7 != i) for i, name in enumerate(SEVEN)}
        found = Found(half * self.price, jnp.where(held, lot.entry, -jnp.inf), lot.age, flags)
        return lot.replace(quantity=jnp.where(gone, 0, half)), found


def by_hand(lots: dict[str, np.ndarray], price: float) -> tuple[np.ndarray, dict[str, float]]:
    """Of one account."""
    held, half = lots["quantity"] > 0, np.floor(lots["quantity"] / 2)
    new = np.where(half < 2, 0, half)
    totals = {"sum": (half * price).sum(), "oldest": lots["age"].max()}
    totals["highest"] = lots["entry"][held].max() if held.any() else -np.inf
    totals |= {name: (held & (lots["age"] % 7 != i)).sum() for i, name in enumerate(SEVEN)}
    return new, totals


@pytest.mark.parametrize("inserting", [False, True], ids=["lots as they are", "a lot opens"])
@pytest.mark.parametrize(
    ("slots", "program"),
    [(1, Program("cpu")), (4, Program("gpu", 8)), (4, Program("cpu", 300)), (40, Program("cpu", 300)),
     (1024, Program("cpu", 256)), (4, Program("cpu", 300, loops=False))],
    ids=str,
)  # fmt: skip
def test_a_rule_for_one_lot_is_applied_to_all(slots, program, inserting):
    rng, batch = np.random.default_rng(slots), () if program.num_envs is None else (program.num_envs,)
    shape = (slots, *batch)
    quantity = np.where(rng.random(shape) < 0.4, rng.integers(1, 9, shape), 0).astype(np.float32)
    quantity[slots // 2 + 1 :] = 0  # no account uses the last slots
    if batch:
        quantity[:, 0], quantity[: slots // 2 + 1, 1] = 0, 7  # an empty account and a full one
    age, entry = (np.where(quantity > 0, rng.integers(1, 50, shape), 0) for _ in range(2))
    lots = open_account(jnp.float32(1), slots).lots
    lots = jax.tree.map(lambda x: jnp.broadcast_to(x.reshape(-1, *[1] * len(batch)), shape), lots)
    lots = lots.replace(quantity=jnp.asarray(quantity), age=jnp.asarray(age, jnp.int32), entry=jnp.float32(entry))
    insert, at = None, np.full(batch, NO_SLOT)
    if inserting:
        free = (quantity == 0).argmax(axis=0)
        at = np.where((quantity == 0).any(axis=0) & (rng.random(batch) < 0.5), free, NO_SLOT).astype(np.int32)
        new = jax.tree.map(lambda x: jnp.full(batch, 3, x.dtype), lots).replace(quantity=jnp.full(batch, 6.0))
        insert = Insert(new, jnp.asarray(at))
    got, totals, free = jax.jit(lambda lots, insert: over_lots(Halve(jnp.float32(2)), lots, program, insert))(
        lots, insert
    )
    for i in np.ndindex(batch):
        lot = {"quantity": quantity[(slice(None), *i)].copy(), "age": age[(slice(None), *i)].copy()}
        lot["entry"] = entry[(slice(None), *i)].copy()
        if at[i] != NO_SLOT:
            lot["quantity"][at[i]], lot["age"][at[i]], lot["entry"][at[i]] = 6, 3, 3
        expected, sums = by_hand(lot, 2.0)
        np.testing.assert_array_equal(got.quantity[(slice(None), *i)], expected)
        np.testing.assert_array_equal(got.age[(slice(None), *i)], lot["age"])
        found = {name: totals.events[name] for name in SEVEN} | totals._replace(events=None)._asdict()
        assert {name: float(x[i]) for name, x in found.items() if name != "events"} == sums
        if not inserting:
            lowest = np.flatnonzero(expected == 0)
            assert free[i] == lowest[0] if len(lowest) else free[i] >= slots
