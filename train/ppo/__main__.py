"""The command line of the trainer."""

import contextlib
import os
import sys

from train.ppo.command import parse
from train.ppo.run import continue_run, train
from train.stopping import Interrupted


def main(args: list[str] | None = None, prog: str = "python -m train.ppo") -> None:
    """Parse the arguments and train; a wrong value is one line and exit status 2."""
    try:
        settings = tyro.cli(Settings, args=args, prog=prog)
        train(Config(**vars(settings)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as error:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        # A usual exit would wait for the compilation in the thread that was left behind.
        os._exit(128 + error.signum)
    except KeyboardInterrupt:  # before anything has begun
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
