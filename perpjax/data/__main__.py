"""`python -m perpjax.data import FILE... --out F.parquet`: one table out of files; `build` makes a dataset."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pyarrow.parquet
import tyro
from rich.console import Console
from rich.text import Text

from perpjax._describe import format_time
from perpjax.data import build
from perpjax.data.contract import DataError
from perpjax.data.files.door import group_kinds
from perpjax.data.files.mend import mend
from perpjax.data.files.read import read_files
from perpjax.data.files.recognise import recognise
from perpjax.data.files.records import Choices


@dataclasses.dataclass(frozen=True)
class Import:
    """Read files of one kind (candles, mark prices or funding) of one symbol, and write them as one Parquet table."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files, folders or globs."""
    out: Path
    """Parquet file to write."""
    choices: tyro.conf.OmitArgPrefixes[Choices] = dataclasses.field(default_factory=Choices)


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[build.Args, tyro.conf.subcommand("build")]
)  # fmt: skip


def main(argv: Sequence[str] | None = None, prog: str = "python -m perpjax.data") -> int:
    """Run the command line; returns the exit status: 0, or 2 after one line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["build"]:
        return build.main(args[1:], f"{prog} build")
    command = tyro.cli(Command, args=args, prog=prog, description="Market data: from files to tables and datasets.")
    try:
        _import(command)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _import(args: Import) -> None:
    if args.out.exists():
        raise DataError(f"{args.out}: exists; name another file")
    series = [recognise(raw, args.choices) for raw in read_files(args.files)]
    kinds = group_kinds(series)
    if len(kinds) > 1:
        shown = ", ".join(f"{symbol or 'no symbol'} {kind}" for symbol, kind in kinds)
        raise DataError(f"these files hold {shown}; give files of one kind and symbol, or use build")
    (((symbol, kind), parts),) = kinds.items()
    mended = mend(parts, args.choices)
    temporary = args.out.with_name(f"{args.out.name}.tmp")
    pyarrow.parquet.write_table(mended.table, temporary, compression="zstd")
    os.replace(temporary, args.out)
    console, stamps = Console(highlight=False), mended.table.column(0)
    for text in [f"{one.source}: {'; '.join(one.taken)}" for one in parts] + list(mended.words):
        console.print(Text(text))
    first, last = (format_time(stamps[i].as_py()) for i in (0, -1))
    console.print(Text(f"{symbol or ''} {kind}: {mended.table.num_rows:,} rows, {first} to {last} UTC, in {args.out}"))


if __name__ == "__main__":
    sys.exit(main())
