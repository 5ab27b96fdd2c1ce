"""The command line of the trainer."""

import contextlib
import os
import sys

import jax

from train.compilation import use_cache
from train.ppo.command import parse
from train.ppo.run import continue_run, train
from train.stopping import Interrupted


def main(args: list[str] | None = None, prog: str = "python -m train.ppo") -> None:
    """Parse the arguments and train.

    A wrong value is one line and exit status 2. A signal ends the process with 128 + its number.
    """
    try:
        config, resumed = parse(sys.argv[1:] if args is None else args, prog)
        use_cache(config.cache)
        if resumed is None:
            train(config)
        else:
            continue_run(config, resumed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("error: the device is out of memory; lower --num-envs or --num-steps", file=sys.stderr)
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
