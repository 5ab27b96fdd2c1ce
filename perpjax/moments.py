"""What a bar does to every lot of an account: written once for one lot, computed slot by slot or for all at once."""

import abc
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from perpjax._pytree import pytree
from perpjax.batching import fold, slot_by_slot, stage
from perpjax.state import Lots

Sums = TypeVar("Sums")
T = TypeVar("T")

NO_SLOT = 2**30
"""More than any slot."""
RESULTS = 7
"""XLA runs more kernels than this side by side if they are of one stage; that costs more than small ones take."""


class Moment(abc.ABC, Generic[Sums]):
    """What happens to each lot of an account at one moment of a bar, and what that brings; see `each_lot`.

    A lot is one slot's, its fields of shape [...], or that of all slots at once, [lots, ...].
    """

    def read(self, lot: Lots, slot: Int[Array, "..."] | int) -> Lots:
        """The lot in a slot, when the moment begins."""
        return lot

    @property
    @abc.abstractmethod
    def steps(self) -> tuple[Callable[..., Any], ...]:
        """What finds out what happens to a lot: functions of it and of the facts that those before have found."""

    @abc.abstractmethod
    def weigh(self, lot: Lots, facts: tuple, slot: Int[Array, "..."] | int) -> Sums:
        """What one lot adds to its account's sums."""

    @abc.abstractmethod
    def write(self, lot: Lots, facts: tuple) -> dict[str, Array]:
        """The fields that change, by name."""

    def add(self, a: Sums, b: Sums) -> Sums:
        """Both together."""
        return jax.tree.map(jnp.add, a, b)

    def start(self, zeros: Sums) -> Sums:
        """The sums over no lot."""
        return zeros


@pytree(static=("names", "bits"))
class Tally:
    """How many lots are what, by name. The counts share words: they are added up together."""

    words: list[Int[Array, "..."]]
    names: tuple[str, ...]
    bits: int

    @classmethod
    def of(cls, flags: dict[str, Bool[Array, "..."]], most: int) -> "Tally":
        """Of one lot, of at most so many that are added up."""
        names, bits = tuple(flags), most.bit_length()
        words = []
        for i in range(0, len(names), 31 // bits):
            some = names[i : i + 31 // bits]
            ones = (jnp.where(flags[name], 1 << bits * j, 0) for j, name in enumerate(some))
            words.append(functools.reduce(jnp.add, ones))
        return cls(words, names, bits)

    def __getitem__(self, name: str) -> Int[Array, "..."]:
        return self.at(np.int32(self.names.index(name)))

    def at(self, place: Int[np.ndarray, "..."]) -> Int[Array, "..."]:
        """Of the names in these places; 0 where there is none."""
        some, count = 31 // self.bits, 0
        for i, word in enumerate(self.words):
            here = place - some * i
            inside = (here >= 0) & (here < some)
            count += (word >> self.bits * here * inside) & inside * np.int32((1 << self.bits) - 1)
        return count


def each_lot(moment: Moment[Sums], lots: Lots, used: Int[Array, "..."]) -> tuple[Lots, Sums]:
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
        facts = _look(moment, lot, lambda lot: lot)
        return moment.weigh(lot, facts, slot), moment.write(lot, facts)

    def do_slot(carry: tuple) -> tuple:
        slot, lots, sums = carry
        more, fields = pass_through(lots, slot)
        new = {name: lax.dynamic_update_index_in_dim(getattr(lots, name), x, slot, 0) for name, x in fields.items()}
        return slot + 1, lots.replace(**new), moment.add(sums, more)

    last, first = jnp.max(used), jnp.int32(0)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(pass_through, lots, first)[0])
    return lax.while_loop(lambda carry: carry[0] < last, do_slot, (first, lots, moment.start(zeros)))[1:]


def _all_lots(moment: Moment[Sums], lots: Lots) -> tuple[Lots, Sums]:
    """As `each_lot`. The sums are written out lot by lot: a GPU stores nothing for them."""
    slots = lots.quantity.shape[0]

    def read(lots: Lots) -> Lots:
        return moment.read(lots, lax.broadcasted_iota(jnp.int32, lots.quantity.shape, 0))

    facts = _look(moment, lots, read)

    def weigh(lots: Lots, facts: tuple, slot: int) -> Sums:
        return moment.weigh(moment.read(_row(lots, slot), slot), _row(facts, slot), slot)

    def add_up(lots: Lots, facts: tuple) -> Sums:
        return functools.reduce(moment.add, (weigh(lots, facts, slot) for slot in range(slots)))

    leaves, tree = jax.tree.flatten(jax.eval_shape(add_up, lots, facts))
    sums = []
    for i in range(0, len(leaves), RESULTS):
        some = stage(lambda *args, i=i: jax.tree.leaves(add_up(*args))[i : i + RESULTS])
        sums += some(lots, facts)
    now = read(lots)
    return now.replace(**moment.write(now, facts)), jax.tree.unflatten(tree, sums)


def _look(moment: Moment, lots: Lots, read: Callable[[Lots], Lots]) -> tuple:
    """What the steps of a moment find, each in a stage that reads the lots anew."""
    facts = ()
    for step in moment.steps:

        def find(lots: Lots, facts: tuple, step: Callable = step) -> Any:
            return step(read(lots), *facts)

        find.__qualname__ = step.__qualname__  # its name in profiles
        facts = (*facts, stage(find)(lots, facts))
    return facts


@stage
def count_used(lots: Lots) -> Int[Array, "..."]:
    """Slots in use: from the first to the last that holds a lot."""
    slots = lax.broadcasted_iota(jnp.int32, lots.quantity.shape, 0)
    return fold(jnp.maximum, jnp.where(lots.quantity > 0, slots + 1, 0))


def _row(tree: T, i: int) -> T:
    return jax.tree.map(lambda x: x[i], tree)
