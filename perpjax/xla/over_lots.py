"""A rule for one lot, applied to every lot of an account."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from perpjax._arrays import fold
from perpjax._pytree import pytree
from perpjax.rules.lot_rule import LotRule
from perpjax.state import LOT_FIELDS, Lots
from perpjax.xla.kernels import Target

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
    rule: LotRule, lots: Lots, target: Target, insert: Insert | None = None, store_counts: bool = False
) -> tuple[Lots, Any, Int[Array, "..."] | None]:
    """Apply a rule to every lot of every account.

    A GPU and small batches take all slots at once. Many environments on a CPU take a loop over slots that ends with
    the last one in use in any account. Accounts fill their lowest slots first, so most slots are skipped.

    Args:
      lots: fields of [lots, ...], slots first.
      insert: a lot that opens.
      store_counts: whether a GPU keeps the counts in memory, for kernels that do not read the lots.

    Returns:
      The lots; the account's totals, with counts in place of flags; and its lowest free slot (None with `insert`).
    """
    others = {name: getattr(lots, name) for name in LOT_FIELDS if name not in rule.fields}
    apply = _slot_by_slot if target.slot_by_slot else _all_at_once
    axis = lots.slot_axis
    lots, sums = apply(rule, lots.replace(**dict.fromkeys(others), slot_axis=-1), target, insert)
    lots = lots.replace(**others, slot_axis=axis)
    if store_counts:
        return lots, sums.totals, sums
    return lots, sums.totals, sums.free


@pytree(static=("form", "flags", "bits"))
class _Sums:
    """A rule's totals while they are added up: counts share words, so that they are added together."""

    numbers: dict[str, Array]
    words: list[Int[Array, "..."]]
    free: Int[Array, "..."] | None
    form: Any
    flags: tuple[str, ...]
    bits: int

    @classmethod
    def of(cls, totals: Any, free: Array | None, slots: int) -> "_Sums":
        """The share of one lot; at most `slots` of them are added up."""
        numbers = totals._asdict()
        flags = tuple(name for name, x in numbers.items() if x.dtype == bool)
        bits, words = slots.bit_length(), []
        for i in range(0, len(flags), 31 // bits):
            ones = (jnp.where(numbers[name], 1 << bits * j, 0) for j, name in enumerate(flags[i : i + 31 // bits]))
            words.append(functools.reduce(jnp.add, ones))
        numbers = {name: x for name, x in numbers.items() if name not in flags}
        return cls(numbers, words, free, type(totals), flags, bits)

    def start(self, free: Array) -> "_Sums":
        """The sums over no lot, in the shapes of these."""

        def lowest(name: str, x: Any) -> Array:
            floor = -jnp.inf if name in self.form.MAXIMA and jnp.issubdtype(x.dtype, jnp.floating) else 0
            return jnp.full(x.shape, floor, x.dtype)

        return self.replace(
            numbers={name: lowest(name, x) for name, x in self.numbers.items()},
            words=[jnp.zeros(x.shape, x.dtype) for x in self.words],
            free=None if self.free is None else jnp.full(self.free.shape, free),
        )

    def plus(self, other: "_Sums") -> "_Sums":
        """Both together."""
        return self.replace(
            numbers={
                name: jnp.maximum(x, other.numbers[name]) if name in self.form.MAXIMA else x + other.numbers[name]
                for name, x in self.numbers.items()
            },
            words=[a + b for a, b in zip(self.words, other.words, strict=True)],
            free=None if self.free is None else jnp.minimum(self.free, other.free),
        )

    @property
    def totals(self) -> Any:
        """The totals, with counts in place of flags."""
        counts = {}
        for i, name in enumerate(self.flags):
            word, place = divmod(i, 31 // self.bits)
            counts[name] = self.words[word] >> self.bits * place & (1 << self.bits) - 1
        return self.form(**self.numbers, **counts)


def _slot_by_slot(rule: LotRule, lots: Lots, target: Target, insert: Insert | None) -> tuple[Lots, _Sums]:
    slots = lots.quantity.shape[0]

    @target.own_kernel
    def read_slot(lots: Lots, slot: Array) -> Lots:
        lot = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, slot, keepdims=False), lots)
        return insert.into(lot, slot) if insert else lot

    @target.own_kernel
    def count_used(lots: Lots) -> Array:
        return fold(jnp.maximum, jnp.where(lots.quantity > 0, _slot_numbers(lots) + 1, 0))

    @jax.jit  # traced once, for the shapes of the sums and for the sums
    def visit(lots: Lots, slot: Array) -> tuple[_Sums, dict[str, Array]]:
        lot = read_slot(lots, slot)
        new, share = _apply(rule, lot, _decide(rule, lot, target, lambda lot: lot), slot, slots, insert)
        return share, {n: getattr(new, n) for n in rule.fields if insert or getattr(new, n) is not getattr(lot, n)}

    def visit_next(carry: tuple) -> tuple:
        slot, lots, sums = carry
        share, changes = visit(lots, slot)
        new = {n: lax.dynamic_update_index_in_dim(getattr(lots, n), x, slot, 0) for n, x in changes.items()}
        return slot + 1, lots.replace(**new), sums.plus(share)

    last = jnp.max(count_used(lots))
    if insert:
        last = jnp.maximum(last, jnp.max(jnp.where(insert.slot == NO_SLOT, 0, insert.slot + 1)))
    start = jax.eval_shape(visit, lots, jnp.int32(0))[0].start(last)
    return lax.while_loop(lambda carry: carry[0] < last, visit_next, (jnp.int32(0), lots, start))[1:]


def _all_at_once(rule: LotRule, lots: Lots, target: Target, insert: Insert | None) -> tuple[Lots, _Sums]:
    """The sums are written out lot by lot: a GPU stores nothing for them."""
    slots = lots.quantity.shape[0]

    def read(lots: Lots, slot: Any) -> Lots:
        return insert.into(lots, slot) if insert else lots

    facts = _decide(rule, lots, target, lambda lots: read(lots, _slot_numbers(lots)))

    def add_up(lots: Lots, facts: tuple) -> _Sums:
        def share(slot: int) -> _Sums:
            lot, of_lot = jax.tree.map(lambda x: x[slot], (lots, facts))
            return _apply(rule, read(lot, slot), of_lot, slot, slots, insert)[1]

        return functools.reduce(_Sums.plus, map(share, range(slots)))

    leaves, tree = jax.tree.flatten(jax.eval_shape(add_up, lots, facts))
    sums = []
    for i in range(0, len(leaves), RESULTS):
        some = target.own_kernel(lambda *args, i=i: jax.tree.leaves(add_up(*args))[i : i + RESULTS])
        sums += some(lots, facts)
    new = rule.apply(read(lots, _slot_numbers(lots)), *_as_flags(facts))[0]
    return new, jax.tree.unflatten(tree, sums)


def _decide(rule: LotRule, lots: Lots, target: Target, read: Callable[[Lots], Lots]) -> tuple:
    """The facts about the lots, each in a kernel that reads the lots anew. A flag is stored as a byte."""
    stored = ()
    for decision in rule.decide:

        def find(lots: Lots, stored: tuple, decision: Callable = decision) -> Any:
            fact = decision(read(lots), *_as_flags(stored))
            return jax.tree.map(lambda x: x.astype(jnp.int8) if x.dtype == bool else x, fact)

        find.__qualname__ = decision.__qualname__  # its name in profiles
        stored = (*stored, target.own_kernel(find)(lots, stored))
    return stored


def _as_flags(stored: tuple) -> tuple:
    return jax.tree.map(lambda x: x != 0 if x.dtype == jnp.int8 else x, stored)


def _apply(rule: LotRule, lot: Lots, facts: tuple, slot: Any, slots: int, insert: Insert | None) -> tuple[Lots, _Sums]:
    new, totals = rule.apply(lot, *_as_flags(facts))
    free = None if insert else jnp.where(new.quantity > 0, NO_SLOT, slot)
    return new, _Sums.of(totals, free, slots)


def _slot_numbers(lots: Lots) -> Int[Array, "lots ..."]:
    return lax.broadcasted_iota(jnp.int32, lots.quantity.shape, 0)
