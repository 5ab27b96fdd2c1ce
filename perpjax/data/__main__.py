"""`python -m perpjax.data`: `import` makes a table out of files, `describe` lists files, `build` makes a dataset."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
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


@dataclasses.dataclass(frozen=True)
class Describe:
    """Print a Markdown table with a row for each file: kind, span, volume and the choices made, or the refusal."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files, folders or globs."""
    choices: tyro.conf.OmitArgPrefixes[Choices] = dataclasses.field(default_factory=Choices)


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Describe, tyro.conf.subcommand("describe")]
    | Annotated[build.Args, tyro.conf.subcommand("build")]
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m perpjax.data") -> int:
    """Run the command line; returns the exit status: 0, or 2 after one line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["build"]:
        return build.main(args[1:], f"{prog} build")
    command = tyro.cli(Command, args=args, prog=prog, description="Market data: from files to tables and datasets.")
    try:
        if isinstance(command, Describe):
            print("\n".join(describe(command.files, command.choices)))
        else:
            _import(command)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def describe(paths: Sequence[Path], choices: Choices = Choices()) -> list[str]:  # noqa: B008
    """Return the lines of a Markdown table, one for each file: each is read and mended by itself."""
    lines = [
        "| file | holds | rows | first (UTC) | last | volume | taken, or why not |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                rows = [_describe_table(raw, choices) for raw in read_files([file])]
            except DataError as error:
                rows = [("-", "-", "-", "-", "-", str(error).removeprefix(str(file)).lstrip(": "))]
            except ValueError as error:
                rows = [("-", "-", "-", "-", "-", str(error))]
            for row in rows:
                cells = (" ".join(cell.split()).replace("|", r"\|") for cell in (file.name, *row))
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _describe_table(raw: object, choices: Choices) -> tuple[str, ...]:
    one = recognise(raw, choices)
    mended = mend([one], choices)
    table = mended.table
    first, last = (format_time(table.column(0)[i].as_py()) for i in (0, -1))
    volume = "-"
    if one.kind == "candles" and not table["volume"].null_count:
        volume = f"{np.sum(table['volume'].to_numpy()):,.10g}"
    holds = f"{one.kind} {one.symbol or ''}".strip()
    return holds, f"{table.num_rows:,}", first, last, volume, "; ".join([*one.taken, *mended.words])


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
