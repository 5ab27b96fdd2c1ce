"""The command line of the trainer."""

import sys

import tyro

from train.ppo.config import Config, Settings
from train.ppo.run import train


def main(args: list[str] | None = None, prog: str = "python -m train.ppo") -> None:
    """Parse the arguments and train; a wrong value is one line and exit status 2."""
    try:
        settings = tyro.cli(Settings, args=args, prog=prog)
        train(Config(**vars(settings)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
