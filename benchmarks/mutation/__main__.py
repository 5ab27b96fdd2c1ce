"""Mutation testing: which small errors in the simulator would the tests let pass?

    pip install -e '.[test,mutation]'
    python -m benchmarks.mutation [--modules margin risk] [--sample 50] [--again]

cosmic-ray's operators make the mutants; each is written into a copy of the working tree, where the tests of TESTS run
until one fails. A survivor is either explained in `survivors.toml` or a hole in the tests, and then the exit status is
1. `--again` runs only those that survived last time.
"""

import ast
import dataclasses
import difflib
import itertools
import json
import os
import pathlib
import queue
import random
import shutil
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator

import tyro
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.plugins import get_operator
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from benchmarks.mutation.operators import OPERATORS, SwapCall
from benchmarks.mutation.suite import run_suite

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
COPIED = ("perpjax", "train", "tests", "pyproject.toml")
TESTS = ("rules", "intrabar", "risk", "ledger")
"""Files, or tests of a file, without `test_` and `.py`."""
FIRST = {
    "margin": ("margin",),
    "intrabar": ("intrabar::test_counting_equals_a_loop_over_candles", "intrabar"),
    "execution": ("intrabar::test_fill_prices", "intrabar"),
    "lots": ("rules", "ledger", "intrabar", "vec_env"),
    "risk": ("risk",),
    "env": ("rules", "ledger"),
    "rewards": ("rewards",),
    "orders": ("orders",),
    "observation": ("rules",),
    "moments": ("rules", "ledger", "vec_env"),
    "state": ("ledger::test_two_float_sums_are_renormalised", "rules", "ledger"),
}
"""Modules, each with its most telling tests; those of TESTS follow."""
QUICK = {
    # XLA compiles a step in a fifth of the time.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@dataclasses.dataclass
class Args:
    """What to mutate."""

    modules: tuple[str, ...] = tuple(FIRST)
    """Modules of perpjax."""
    sample: int | None = None
    """This many mutants, drawn at random."""
    again: bool = False
    """Only the survivors that `out` lists; the outcomes of the others are taken from there."""
    workers: int = 2
    """Copies of the tree in which mutants run at the same time."""
    out: pathlib.Path = RESULT


@dataclasses.dataclass
class Mutant:
    """One small change of one line, and what became of it."""

    module: str
    line: int
    before: str
    after: str
    outcome: str = ""
    killer: str = ""
    seconds: float = 0.0
    source: str = ""

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.module, self.before, self.after


def executed(source: str) -> str:
    """The code without its type hints, in one form."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(None))
    return ast.dump(tree)


def make_mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module that changes what is executed."""
    original = (ROOT / "perpjax" / f"{module}.py").read_text()
    for operator in (*(get_operator(f"core/{name}")() for name in OPERATORS), SwapCall()):
        occurrence = 0
        while source := MutationVisitor.mutate_code(original, operator, occurrence):
            occurrence += 1
            if executed(source) == executed(original):
                continue
            old, new = original.splitlines(), source.splitlines()
            changes = [c for c in difflib.SequenceMatcher(None, old, new, False).get_opcodes() if c[0] != "equal"]
            (_, start, stop, first, last) = changes[0]
            before, after = (" ".join(x.strip() for x in lines) for lines in (old[start:stop], new[first:last]))
            yield Mutant(module, start + 1, before, after, source=source)


def name_tests(module: str) -> list[str]:
    """The tests of a module, as pytest wants them named."""
    names = dict.fromkeys((*FIRST[module], *TESTS))
    return [find_test(*name.split("::")) for name in names]


def find_test(module: str, test: str = "") -> str:
    """A file of tests, or one test of it, as pytest wants it named."""
    (path,) = (ROOT / "tests").rglob(f"test_{module}.py")
    return str(path.relative_to(ROOT)) + (f"::{test}" if test else "")


def work(tree: pathlib.Path, timeout: float, todo: queue.SimpleQueue, done: queue.SimpleQueue) -> None:
    """Run mutants in one copy of the tree until none is left. What goes wrong is handed on, not raised."""
    try:
        while True:
            mutant = todo.get_nowait()
            path, began = tree / "perpjax" / f"{mutant.module}.py", time.monotonic()
            original = path.read_text()
            path.write_text(mutant.source)
            mutant.outcome, mutant.killer = run_suite(tree, name_tests(mutant.module), timeout, fill_cache=False)
            mutant.seconds = round(time.monotonic() - began, 1)
            path.write_text(original)
            done.put(mutant)
    except queue.Empty:
        pass
    except Exception as error:
        done.put(error)


def run_all(mutants: list[Mutant], workers: int) -> Iterator[Mutant]:
    """Fill in the outcomes, in `workers` copies of the tree; yields each mutant when it is done."""
    todo, done = queue.SimpleQueue(), queue.SimpleQueue()
    for mutant in mutants:
        todo.put(mutant)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        trees = [pathlib.Path(folder) / str(i) for i in range(workers)]
        for tree, name in itertools.product(trees, COPIED):
            tree.mkdir(exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, tree / name)
        os.environ |= QUICK | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        # What a mutant leaves as it was is compiled once, by the tests without a mutation.
        with console.status("running the tests without a mutation"):
            began = time.monotonic()
            tests = dict.fromkeys(t for m in mutants for t in name_tests(m.module))
            outcome, failed = run_suite(trees[0], list(tests), 3600, fill_cache=True)
        if outcome != "survived":
            raise RuntimeError(f"the tests do not pass without a mutation: {failed}")
        timeout = 60 + 5 * (time.monotonic() - began)
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
            bar = progress.add_task("mutants", total=len(mutants))
            for tree in trees:
                threading.Thread(target=work, args=(tree, timeout, todo, done), daemon=True).start()
            for _ in mutants:
                result = done.get()
                if isinstance(result, Exception):
                    raise result
                progress.advance(bar)
                if result.outcome == "survived":
                    console.print(
                        f"{result.module}:{result.line}\n- {result.before}\n+ {result.after}",
                        markup=False,
                        soft_wrap=True,
                    )
                yield result


def save(mutants: list[Mutant], seconds: float, path: pathlib.Path) -> None:
    """Write one line a mutant."""
    rows = [{k: v for k, v in dataclasses.asdict(m).items() if k != "source"} for m in mutants]
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{"seconds": {seconds:.0f}, "mutants": [\n{lines}\n]}}\n')
    partial.replace(path)


def show(mutants: list[Mutant]) -> int:
    """Print the table and the survivors; returns how many of those nobody has explained."""
    console = Console(width=120)
    groups = tomllib.loads((pathlib.Path(__file__).parent / "survivors.toml").read_text())["equivalent"]
    reasons = {(g["module"], g["before"], after): g["why"] for g in groups for after in g["after"]}
    table = Table("module", "mutants", "killed", "timeouts", "survived", "explained", "killed %")
    for module in (*dict.fromkeys(m.module for m in mutants), "all"):
        mine = [m for m in mutants if module in ("all", m.module)]
        count = Counter(m.outcome for m in mine)
        explained = sum(m.outcome == "survived" and m.identity in reasons for m in mine)
        caught = count["killed"] + count["timeout"]
        numbers = (len(mine), count["killed"], count["timeout"], count["survived"], explained)
        table.add_row(module, *map(str, numbers), f"{100 * caught / len(mine):.1f}")
    console.print(table)
    survivors = [m for m in mutants if m.outcome == "survived"]
    for m in survivors:
        why = reasons.get(m.identity, "NOT EXPLAINED")
        console.print(
            f"\n{m.module}.py:{m.line}\n- {m.before}\n+ {m.after}\n  {why}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return sum(m.identity not in reasons for m in survivors)


def main(args: Args) -> int:
    """Make the mutants, run them, say what survived."""
    if unknown := set(args.modules) - set(FIRST):
        raise ValueError(f"no tests are named for {sorted(unknown)}; modules are {sorted(FIRST)}")
    if args.out == RESULT and (args.sample or set(args.modules) != set(FIRST)):
        raise ValueError(f"{RESULT.name} is the record of a whole run; give --out for a part of one")
    mutants, seconds = [m for module in args.modules for m in make_mutants(module)], 0.0
    todo = mutants
    if args.sample:
        todo = mutants = random.Random(0).sample(mutants, min(args.sample, len(mutants)))
    if args.again:
        told = json.loads(args.out.read_text())
        old, seconds = {(m["module"], m["before"], m["after"]): m for m in told["mutants"]}, told["seconds"]
        for m in mutants:
            known = old.get(m.identity, {})
            m.outcome, m.killer, m.seconds = (known.get(name, "") for name in ("outcome", "killer", "seconds"))
        todo = [m for m in mutants if m.outcome in ("", "survived")]
    began = time.monotonic()
    for _ in run_all(todo, args.workers) if todo else ():
        save(mutants, seconds + time.monotonic() - began, args.out)
    return min(show(mutants), 1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
