"""The command line of the ladder."""

import sys

import tyro

from train.compilation import use_cache
from train.ladder.climb import Settings, climb


def main(args: list[str] | None = None, prog: str = "python -m train.ladder") -> None:
    """Parse the arguments and climb; a wrong value is one line and exit status 2."""
    try:
        settings = tyro.cli(Settings, args=args, prog=prog)
        use_cache(settings.cache)
        as_it_should_be = climb(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0 if as_it_should_be else 1)


if __name__ == "__main__":
    main()
