"""Mutation testing: break the simulator in one place at a time, and list the faults that the tests let pass.

    pip install -e '.[test,mutation]'
    python -m benchmarks.mutation [--modules rules/margin rules/risk] [--sample 50]

cosmic-ray's operators make the mutants. Each one is written into a copy of the working tree, where the tests of TESTS
run until one fails. `survivors.toml` explains a survivor by its function and its operator. The exit status is 1 if a
survivor is not explained. A run of all modules writes its counts to benchmarks/results/mutation.json.
"""

import ast
import concurrent.futures
import dataclasses
import fnmatch
import os
import pathlib
import queue
import random
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator

import tyro
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.plugins import get_operator
from parso.tree import NodeOrLeaf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import RESULTS, save
from benchmarks.mutation.operators import OPERATORS, SwapCall
from benchmarks.mutation.suite import run_suite

ROOT = pathlib.Path(__file__).resolve().parents[2]
COPIED = ("perpjax", "train", "tests", "pyproject.toml")
TESTS = ("rules", "intrabar", "risk", "ledger")
"""Files of tests, or tests of a file, without `test_` and `.py`."""
FIRST = {
    "rules/margin": ("margin",),
    "rules/intrabar": ("intrabar::test_counting_equals_a_loop_over_candles", "intrabar"),
    "rules/execution": ("intrabar::test_fill_prices", "intrabar"),
    "rules/exits": ("rules", "ledger", "intrabar", "vec_env"),
    "rules/risk": ("risk",),
    "rules/rewards": ("rewards",),
    "rules/orders": ("orders",),
    "rules/observation": ("rules",),
    "rules/bar": ("rules", "intrabar", "market"),
    "env": ("rules", "ledger"),
    "xla/over_lots": ("over_lots", "rules", "ledger", "vec_env"),
    "state": ("ledger::test_two_float_sums_are_renormalised", "rules", "ledger"),
}
"""The modules of perpjax, by path without `.py`, and the tests to run before those of TESTS."""
QUICK = {
    # XLA compiles a step in a fifth of the time.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@dataclasses.dataclass
class Args:
    """The modules to mutate."""

    modules: tuple[str, ...] = tuple(FIRST)
    """Modules of perpjax."""
    sample: int | None = None
    """Run this many mutants, drawn at random."""
    workers: int = 2
    """Copies of the tree in which mutants run at the same time."""


@dataclasses.dataclass
class Mutant:
    """One small change of one module."""

    module: str
    function: str
    """Qualified name, or "module"."""
    operator: str
    line: int
    source: str
    outcome: str = ""

    @property
    def key(self) -> str:
        return f"{self.function} {self.operator}"


def strip_hints(source: str) -> str:
    """Return the syntax tree without type hints, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(None))
    return ast.dump(tree)


def name_function(node: NodeOrLeaf | None) -> str:
    """Return the qualified name of the function or class around a node; a decorator belongs to its function."""
    names, child = [], None
    while node is not None:
        if node.type == "decorated" and child is not node.children[-1]:
            names.append(node.children[-1].name.value)
        if node.type in ("funcdef", "classdef"):
            names.append(node.name.value)
        child, node = node, node.parent
    return ".".join(reversed(names)) or "module"


def make_mutants(module: str) -> Iterator[Mutant]:
    """Yield every mutant of a module that changes the code behind the type hints."""
    original = (ROOT / "perpjax" / f"{module}.py").read_text()
    unchanged = strip_hints(original)
    for name, operator in [(n, get_operator(f"core/{n}")()) for n in OPERATORS] + [("SwapCall", SwapCall())]:
        sites = [node for node in ast_nodes(get_ast(original)) for _ in operator.mutation_positions(node)]
        for i, node in enumerate(sites):
            source = MutationVisitor.mutate_code(original, operator, i)
            if strip_hints(source) != unchanged:
                short = name.rpartition("Operator_")[2]
                yield Mutant(module, name_function(node), short, node.start_pos[0], source)


def name_tests(module: str) -> list[str]:
    """Return the tests of a module, as pytest wants them named."""
    named = []
    for name in dict.fromkeys((*FIRST[module], *TESTS)):
        file, separator, test = name.partition("::")
        (path,) = (ROOT / "tests").rglob(f"test_{file}.py")
        named.append(f"{path.relative_to(ROOT)}{separator}{test}")
    return named


def run_mutants(mutants: list[Mutant], workers: int) -> Iterator[Mutant]:
    """Fill in the outcomes, in `workers` copies of the tree; yield each mutant when it is done."""
    trees: queue.SimpleQueue[pathlib.Path] = queue.SimpleQueue()

    def run(mutant: Mutant, timeout: float) -> Mutant:
        tree = trees.get()
        path = tree / "perpjax" / f"{mutant.module}.py"
        original = path.read_text()
        path.write_text(mutant.source)
        mutant.outcome = run_suite(tree, name_tests(mutant.module), timeout, fill_cache=False)[0]
        path.write_text(original)
        trees.put(tree)
        return mutant

    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        os.environ |= QUICK | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for i in range(workers):
            tree = pathlib.Path(folder) / str(i)
            tree.mkdir()
            for name in COPIED:
                (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, tree / name)
            trees.put(tree)
        # Programs that a mutant does not change are compiled once, by the tests without a mutation.
        began = time.monotonic()
        tests = dict.fromkeys(test for m in mutants for test in name_tests(m.module))
        outcome, failed = run_suite(tree, list(tests), 3600, fill_cache=True)
        if outcome != "survived":
            raise RuntimeError(f"the tests do not pass without a mutation: {failed}")
        limit = 60 + 5 * (time.monotonic() - began)
        yield from pool.map(lambda m: run(m, limit), mutants)


def explain(survivors: list[Mutant]) -> tuple[int, list[Mutant]]:
    """Return the number of explained survivors, and the others.

    An entry of `survivors.toml` is `"function operator" = [count, reason]`, under its module. `*` stands for any name.
    """
    entries = tomllib.loads((pathlib.Path(__file__).parent / "survivors.toml").read_text())
    left = {(module, key): count for module, rows in entries.items() for key, (count, _) in rows.items()}
    unexplained = []
    for mutant in survivors:
        keys = [k for k in left if k[0] == mutant.module and left[k] and fnmatch.fnmatchcase(mutant.key, k[1])]
        if keys:
            left[keys[0]] -= 1
        else:
            unexplained.append(mutant)
    return len(survivors) - len(unexplained), unexplained


def main(args: Args) -> int:
    """Make the mutants, run them, and print a table; return the exit status."""
    if unknown := set(args.modules) - set(FIRST):
        raise ValueError(f"no tests are named for {sorted(unknown)}; modules are {sorted(FIRST)}")
    mutants = [m for module in args.modules for m in make_mutants(module)]
    if args.sample:
        mutants = random.Random(0).sample(mutants, min(args.sample, len(mutants)))
    console = Console(width=120)
    for mutant in track(run_mutants(mutants, args.workers), "mutants", total=len(mutants)):
        if mutant.outcome == "survived":
            console.print(f"survived: {mutant.module}.py:{mutant.line} {mutant.key}", markup=False)
    table = Table("module", "mutants", "killed", "timeouts", "survived")
    for module in (*args.modules, "all"):
        count = Counter(m.outcome for m in mutants if module in ("all", m.module))
        table.add_row(module, *map(str, (count.total(), count["killed"], count["timeout"], count["survived"])))
    explained, unexplained = explain([m for m in mutants if m.outcome == "survived"])
    console.print(table, f"{explained} survivors are explained; these are not:" if unexplained else "")
    for m in unexplained:
        console.print(f"{m.module}.py:{m.line} {m.key}", markup=False)
    if args == Args(workers=args.workers):
        killed = count["killed"] + count["timeout"]
        row = {"mutants": len(mutants), "killed": killed, "explained": explained, "unexplained": len(unexplained)}
        save(RESULTS / "mutation.json", "benchmarks.mutation", [row])
    return min(len(unexplained), 1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
