"""Every lot of an episode, from its opening to its end, as recorded by the float64 twin."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from perpjax.audit.agreement import Seen, lead, take_over, twin_market, twin_params
from perpjax.data.markets import to_device
from perpjax.env import PerpEnv
from perpjax.market import Market
from perpjax.reference import Exit, Lot, Twin
from perpjax.rules.orders import check_action
from perpjax.state import State


@dataclasses.dataclass
class LotLife:
    """One lot, opened at the open of a bar. Prices are ticks; bars count as in `State.t`."""

    slot: int
    lot: Lot
    """The lot at its opening. For a lot held in the first state: the lot in that state."""
    entry_bar: int
    """Bar of the opening; it may lie before the first state."""
    liquidations: list[float] = dataclasses.field(default_factory=list)
    """Its liquidation price in each replayed bar; 0: none. Funding moves it."""
    exit_bar: int | None = None
    """None: still open in the last state."""
    exit: Exit | None = None
    """The reason, the candle, the fill and the money of its end."""


class Replay(NamedTuple):
    """The twin's account of an episode, up to the first disagreement with the simulator."""

    lives: list[LotLife]
    """In the order of their opening."""
    equity: Float[np.ndarray, "states"]
    """The twin's, after each step on which both agree; first that of the first state."""
    disagreement: str
    """The first one, with its bar; empty if there is none."""


def replay_lots(env: PerpEnv, states: Sequence[State], actions: Sequence[ArrayLike]) -> list[LotLife]:
    """Replay steps of the simulator in the float64 twin, and record every lot that was held or opened.

    Args:
      states: consecutive and unbatched, of one episode, without auto-reset. The first need not come from a reset.
      actions: one between each state and the next.

    Returns:
      The lots in the order of their opening.

    Raises:
      ValueError: if the states are batched or not consecutive, or if twin and simulator disagree in a bar.
    """
    if len(states) != len(actions) + 1:
        raise ValueError(f"{len(states)} states and {len(actions)} actions: give one action between two states")
    for state in states:
        if np.ndim(state.t):
            raise ValueError(f"a state of {np.shape(state.t)} environments; give states of one, see VecEnv.one")
    told = jax.tree.map(lambda *x: np.stack(x), *(jax.device_get(s.replace(key=None)) for s in states))
    replay = replay_states(env, told, actions)
    if replay.disagreement:
        raise ValueError(f"the float64 twin and the simulator disagree in {replay.disagreement}")
    return replay.lives


def replay_states(env: PerpEnv, told: State, actions: Sequence[ArrayLike]) -> Replay:
    """Replay as `replay_lots`, from states in one tree. A disagreement ends the replay and is no error.

    Args:
      told: NumPy arrays [steps + 1, ...], by row, without a key.

    Raises:
      ValueError: if the states are not consecutive.
    """
    _check_clock(told)
    # The twin gets the bars of these states and one more before: a whole market would take longer than the replay.
    start = int(told.t[0])
    moved = told.replace(t=told.t - (start - 1), end=told.end - (start - 1))
    seen = Seen(moved)
    twin = Twin(twin_market(_cut(env.market, told)), twin_params(env.params, env.config))
    take_over(twin, moved, seen)
    held = {
        slot: LotLife(slot, dataclasses.replace(lot), start - lot.age)
        for slot, lot in enumerate(twin.state.lots)
        if lot
    }
    lives = sorted(held.values(), key=lambda life: life.entry_bar)
    equity, disagreement = [float(twin.state.equity)], ""
    chosen = [np.asarray(check_action(action, env.config)) for action in actions]
    for bar, why in enumerate(lead(twin, seen, chosen), start):
        if why:
            disagreement = f"bar {bar}: {why}"
            break
        equity.append(float(twin.state.equity))
        # Exits come first: a lot may take a slot that another lot left in this bar.
        present = [(x.slot, x.lot, x) for x in twin.state.exits]
        present += [(slot, lot, None) for slot, lot in enumerate(twin.state.lots) if lot]
        for slot, lot, end in present:
            if slot not in held:
                held[slot] = LotLife(slot, dataclasses.replace(lot, age=0), bar)
                lives.append(held[slot])
            life = held[slot]
            life.liquidations.append(lot.liquidation)
            if end:
                life.exit_bar, life.exit = bar, end
                del held[slot]
    return Replay(lives, np.asarray(equity), disagreement)


def _check_clock(states: State) -> None:
    over = states.terminated | states.truncated
    wrong = states.t[1:] != states.t[:-1] + ~over[:-1]
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"states {i} and {i + 1} are at bars {states.t[i]} and {states.t[i + 1]}; "
            "give the consecutive states of one episode"
        )


def _cut(market: Market, states: State) -> Market:
    """Return the rows of the states, and their instrument. A market may hold many symbols and years."""
    row = 0 if market.instruments.tick_size.shape[0] == 1 else int(states.instrument[0])
    return market.replace(
        rows=to_device(np.asarray(market.rows)[int(states.t[0]) - 1 : int(states.t[-1]) + 1]),
        instruments=jax.tree.map(lambda x: x[row : row + 1], market.instruments),
    )
