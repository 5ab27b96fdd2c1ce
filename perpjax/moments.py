"""What a bar does to every lot of an account: written once for one lot, computed slot by slot or for all at once."""

import abc
import functools
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from perpjax.batching import fold, slot_by_slot, stage
from perpjax.state import Lots

Facts = TypeVar("Facts")
Sums = TypeVar("Sums")
T = TypeVar("T")

NO_SLOT = 2**30
"""More than any slot."""
RESULTS = 7
"""XLA runs more kernels than this side by side if they are of one stage; that costs more than small ones take."""


class Moment(abc.ABC, Generic[Facts, Sums]):
    """What happens to each lot of an account at one moment of a bar, and what that brings; see `each_lot`.

    A lot is one slot's, its fields of shape [...], or that of all slots at once, [lots, ...].
    """

    def read(self, lot: Lots, slot: Int[Array, "..."] | int) -> Lots:
        """The lot in a slot, when the moment begins."""
        return lot

    @abc.abstractmethod
    def look(self, lot: Lots) -> Facts:
        """What happens to it."""

    @abc.abstractmethod
    def weigh(self, lot: Lots, facts: Facts, slot: Int[Array, "..."] | int) -> Sums:
        """What one lot adds to its account's sums."""

    @abc.abstractmethod
    def write(self, lot: Lots, facts: Facts) -> dict[str, Array]:
        """The fields that change, by name."""

    def add(self, a: Sums, b: Sums) -> Sums:
        """Both together."""
        return jax.tree.map(jnp.add, a, b)

    def start(self, zeros: Sums) -> Sums:
        """The sums over no lot."""
        return zeros


def each_lot(moment: Moment[Facts, Sums], lots: Lots, used: Int[Array, "..."]) -> tuple[Lots, Sums]:
    """All lots after a moment, and its sums over them.

    All at once; but for many environments on a CPU in a loop over slots that ends with the last one in use anywhere.
    Accounts fill their lowest slots first, so that is mostly far from all of them, and what a slot's arithmetic needs
    lies in the cache.

    Args:
      lots: fields of [lots, ...].
      used: slots of each account that may hold a lot; those from here on are free.
    """
    if not slot_by_slot.get():
        return _all_lots(moment, lots)

    @stage
    def read(lots: Lots, slot: Array) -> Lots:
        return moment.read(jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, slot, keepdims=False), lots), slot)

    @jax.jit  # traced once, though asked twice: for the shapes of the sums, and for the sums
    def pass_through(lots: Lots, slot: Array) -> tuple[Sums, dict[str, Array]]:
        lot = read(lots, slot)
        facts = moment.look(lot)
        return moment.weigh(lot, facts, slot), moment.write(lot, facts)

    def do_slot(carry: tuple) -> tuple:
        slot, lots, sums = carry
        more, fields = pass_through(lots, slot)
        new = {name: lax.dynamic_update_index_in_dim(getattr(lots, name), x, slot, 0) for name, x in fields.items()}
        return slot + 1, lots.replace(**new), moment.add(sums, more)

    last, first = jnp.max(used), jnp.int32(0)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(pass_through, lots, first)[0])
    return lax.while_loop(lambda carry: carry[0] < last, do_slot, (first, lots, moment.start(zeros)))[1:]


def _all_lots(moment: Moment[Facts, Sums], lots: Lots) -> tuple[Lots, Sums]:
    """As `each_lot`. The sums are written out lot by lot: a GPU stores nothing for them."""
    slots = lots.quantity.shape[0]
    now = moment.read(lots, lax.broadcasted_iota(jnp.int32, lots.quantity.shape, 0))
    facts = moment.look(now)

    def weigh(lots: Lots, facts: Facts, slot: int) -> Sums:
        return moment.weigh(moment.read(_row(lots, slot), slot), _row(facts, slot), slot)

    def add_up(lots: Lots, facts: Facts) -> Sums:
        return functools.reduce(moment.add, (weigh(lots, facts, slot) for slot in range(slots)))

    leaves, tree = jax.tree.flatten(jax.eval_shape(add_up, lots, facts))
    sums = []
    for i in range(0, len(leaves), RESULTS):
        some = stage(lambda *args, i=i: jax.tree.leaves(add_up(*args))[i : i + RESULTS])
        sums += some(lots, facts)
    return now.replace(**moment.write(now, facts)), jax.tree.unflatten(tree, sums)


@stage
def count_used(lots: Lots) -> Int[Array, "..."]:
    """Slots in use: from the first to the last that holds a lot."""
    slots = lax.broadcasted_iota(jnp.int32, lots.quantity.shape, 0)
    return fold(jnp.maximum, jnp.where(lots.quantity > 0, slots + 1, 0))


def _row(tree: T, i: int) -> T:
    return jax.tree.map(lambda x: x[i], tree)
