"""Signals during a run. The work runs in a thread, because no handler runs while the main thread is inside XLA."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

T = TypeVar("T")

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that end a run. SIGHUP stays ignored under nohup."""
POLL_SECONDS = 0.05


class Interrupted(KeyboardInterrupt):
    """A run that a signal has ended. The message says which checkpoint is whole.

    Attributes:
      signum: the signal. A process that ends by it exits with 128 + signum.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class InThread:
    """Starts work in a daemon thread; a call waits for its result, or raises its error.

    Attributes:
      done: set when the work has ended.
    """

    def __init__(self, work: Callable[[], Any]):
        self.done = threading.Event()
        self._work, self._result, self._error = work, None, None
        self._device = jax.config.jax_default_device  # the caller's choice belongs to its thread
        threading.Thread(target=self._run, name="perpjax", daemon=True).start()

    def _run(self) -> None:
        try:
            with jax.default_device(self._device):
                self._result = self._work()
        except BaseException as error:
            self._error = error
        finally:
            self.done.set()

    def __call__(self) -> Any:
        """Return the result."""
        self.done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class Stopper:
    """Runs work that can be stopped: the first signal asks for it, and a second one leaves the work behind.

    Attributes:
      wanted: the signal that asked, or None. The work reads it between chunks.
      patient: True while a first signal waits for the work to save and return. False leaves it behind at once.
      describe: returns one phrase about the newest whole checkpoint, for the message of a work left behind.
    """

    def __init__(self) -> None:
        self.wanted: int | None = None
        self.patient = False
        self.describe: Callable[[], str] = lambda: "nothing was saved"
        self._again = False

    def run(self, work: Callable[[], T]) -> T:
        """Return `work()`. In a thread other than the main one there are no signals, and the work runs directly.

        Raises:
          Interrupted: a signal came while `patient` was False, or a second one came.
        """
        if threading.current_thread() is not threading.main_thread():
            return work()
        with self._handlers():
            result = InThread(work)
            while not result.done.wait(POLL_SECONDS):
                if self.wanted is not None and (self._again or not self.patient):
                    name = signal.Signals(self.wanted).name
                    raise Interrupted(self.wanted, f"stopped at once by {name}; {self.describe()}")
        return result()

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        before = {s: signal.getsignal(s) for s in SIGNALS}
        caught = [s for s, handler in before.items() if handler is not None and handler != signal.SIG_IGN]
        for s in caught:
            signal.signal(s, self._ask)
        try:
            yield
        finally:
            for s in caught:
                signal.signal(s, before[s])

    def _ask(self, signum: int, _: Any) -> None:
        self._again = self.wanted is not None
        self.wanted = self.wanted or signum
