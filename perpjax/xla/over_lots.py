"""A rule for one lot, applied to every lot of an account."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from perpjax._arrays import fold
from perpjax._pytree import pytree
from perpjax.rules.lot_rule import LotRule
from perpjax.state import LOT_FIELDS, Lots
from perpjax.xla.kernels import Program

NO_SLOT = 2**30
"""More than any slot."""
RESULTS = 7
"""A CPU runs a call of more kernels side by side. That costs more than small ones take."""


class Insert(NamedTuple):
    """A lot that is put into a slot before the rule is applied."""

    lot: Lots
    slot: Int[Array, "..."]
    """`NO_SLOT` if no lot opens."""

    def into(self, lots: Lots, slot: Int[Array, "..."] | int) -> Lots:
        """The lots in these slots, the new one in its place."""
        chosen = self.slot == slot
        return jax.tree.map(lambda new, old: jnp.where(chosen, new, old), self.lot, lots)


def over_lots(
    rule: LotRule, lots: Lots, program: Program, insert: Insert | None = None
) -> tuple[Lots, Any, Int[Array, "..."] | None]:
    """Apply a rule to every lot of every account.

    A GPU and small batches take all slots at once. Many environments on a CPU take a loop over slots that ends with
    the last one in use in any account. Accounts fill their lowest slots first, so most slots are skipped.

    Args:
      lots: fields of [lots, ...], slots first.
      insert: a lot that opens.

    Returns:
      The lots; the account's totals, with `Counts` as `events`; and its lowest free slot (None with `insert`).
    """
    others = {name: getattr(lots, name) for name in LOT_FIELDS if name not in rule.fields}
    axis, age, lots = lots.slot_axis, lots.age, lots.replace(**dict.fromkeys(others), slot_axis=-1)
    if program.slot_by_slot:
        lots, totals, free = _slot_by_slot(rule, lots, age, program, insert)
    else:
        lots, totals, free = _all_at_once(rule, lots, program, insert)
    return lots.replace(**others, slot_axis=axis), totals, free


@pytree(static=("names", "bits"))
class Counts:
    """Counts of lots, by name. They share words, so that they are added together."""

    words: list[Int[Array, "..."]]
    names: tuple[str, ...]
    bits: int

    @classmethod
    def of(cls, flags: dict[str, Bool[Array, "..."]], slots: int) -> "Counts":
        """The flags of one lot; at most `slots` of them are added up."""
        names, bits, words = tuple(flags), slots.bit_length(), []
        for i in range(0, len(names), 31 // bits):
            ones = (flags[name] * np.int32(1 << bits * j) for j, name in enumerate(names[i : i + 31 // bits]))
            words.append(functools.reduce(jnp.add, ones))
        return cls(words, names, bits)

    def __getitem__(self, name: str) -> Int[Array, "..."]:
        word, place = divmod(self.names.index(name), 31 // self.bits)
        return self.words[word] >> self.bits * place & (1 << self.bits) - 1


def _add(a: Any, b: Any) -> Any:
    """The totals of both together."""
    added = {name: jnp.maximum(getattr(a, name), getattr(b, name)) for name in a.MAXIMA}
    return jax.tree.map(jnp.add, a, b)._replace(**added)


def _nothing(shapes: Any) -> Any:
    """The totals of no lot."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    maxima = {name: getattr(zeros, name) for name in zeros.MAXIMA}
    floats = {n: jnp.full_like(x, -jnp.inf) for n, x in maxima.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return zeros._replace(**floats)


def _slot_by_slot(
    rule: LotRule, lots: Lots, age: Array, program: Program, insert: Insert | None
) -> tuple[Lots, Any, Array | None]:
    slots = lots.quantity.shape[0]

    @program.own_kernel
    def read_slot(lots: Lots, slot: Array) -> Lots:
        lot = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, slot, keepdims=False), lots)
        return insert.into(lot, slot) if insert else lot

    @program.own_kernel
    def count_used(quantity: Array, age: Array) -> Array:
        # A lot that the opening check has liquidated has no quantity any more, but its slot is not empty yet.
        return fold(jnp.maximum, jnp.where((quantity > 0) | (age > 0), _slot_numbers(lots) + 1, 0))

    @jax.jit  # traced once, for the shapes of the totals and for the totals
    def visit(lots: Lots, slot: Array) -> tuple[Any, Array, dict[str, Array]]:
        lot = read_slot(lots, slot)
        new, totals, free = _apply(rule, lot, _decide(rule, lot, program, lambda lot: lot), slot, slots)
        changed = [n for n in rule.fields if insert or getattr(new, n) is not getattr(lot, n)]
        return totals, free, {n: getattr(new, n) for n in changed}

    def visit_next(carry: tuple) -> tuple:
        slot, lots, totals, free = carry
        more, is_free, changes = visit(lots, slot)
        new = {n: lax.dynamic_update_index_in_dim(getattr(lots, n), x, slot, 0) for n, x in changes.items()}
        free = None if insert else jnp.minimum(free, is_free)
        return slot + 1, lots.replace(**new), _add(totals, more), free

    last = jnp.max(count_used(lots.quantity, age))
    if insert:
        last = jnp.maximum(last, jnp.max(jnp.where(insert.slot == NO_SLOT, 0, insert.slot + 1)))
    start = _nothing(jax.eval_shape(visit, lots, jnp.int32(0))[0])
    free = None if insert else jnp.full(lots.quantity.shape[1:], last)
    return lax.while_loop(lambda carry: carry[0] < last, visit_next, (jnp.int32(0), lots, start, free))[1:]


def _all_at_once(rule: LotRule, lots: Lots, program: Program, insert: Insert | None) -> tuple[Lots, Any, Array | None]:
    """The totals are written out lot by lot: a GPU stores nothing for them."""
    slots = lots.quantity.shape[0]

    def read(lots: Lots, slot: Any) -> Lots:
        return insert.into(lots, slot) if insert else lots

    facts = _decide(rule, lots, program, lambda lots: read(lots, _slot_numbers(lots)))

    def add_up(lots: Lots, facts: tuple) -> tuple[Any, Array | None]:
        def share(slot: int) -> tuple[Any, Array]:
            lot, of_lot = jax.tree.map(lambda x: x[slot], (lots, facts))
            return _apply(rule, read(lot, slot), of_lot, slot, slots)[1:]

        totals, free = zip(*map(share, range(slots)), strict=True)
        return functools.reduce(_add, totals), None if insert else functools.reduce(jnp.minimum, free)

    leaves, tree = jax.tree.flatten(jax.eval_shape(add_up, lots, facts))
    sums = []
    for i in range(0, len(leaves), RESULTS):
        some = program.own_kernel(lambda *args, i=i: jax.tree.leaves(add_up(*args))[i : i + RESULTS])
        sums += some(lots, facts)
    new = rule.apply(read(lots, _slot_numbers(lots)), *_as_flags(facts))[0]
    return new, *jax.tree.unflatten(tree, sums)


def _decide(rule: LotRule, lots: Lots, program: Program, read: Callable[[Lots], Lots]) -> tuple:
    """The facts about the lots, each in a kernel that reads the lots anew. A flag is stored as a byte."""
    stored = ()
    for decision in rule.decide:

        def find(lots: Lots, stored: tuple, decision: Callable = decision) -> Any:
            fact = decision(read(lots), *_as_flags(stored))
            return jax.tree.map(lambda x: x.astype(jnp.int8) if x.dtype == bool else x, fact)

        find.__qualname__ = decision.__qualname__  # its name in profiles
        stored = (*stored, program.own_kernel(find)(lots, stored))
    return stored


def _as_flags(stored: tuple) -> tuple:
    return jax.tree.map(lambda x: x != 0 if x.dtype == jnp.int8 else x, stored)


def _apply(rule: LotRule, lot: Lots, facts: tuple, slot: Any, slots: int) -> tuple[Lots, Any, Array]:
    """The lot afterwards, its share of the totals, and its slot if that is free."""
    new, totals = rule.apply(lot, *_as_flags(facts))
    totals = totals._replace(events=Counts.of(totals.events, slots))
    return new, totals, jnp.where(new.quantity > 0, NO_SLOT, slot)


def _slot_numbers(lots: Lots) -> Int[Array, "lots ..."]:
    return lax.broadcasted_iota(jnp.int32, lots.quantity.shape, 0)
