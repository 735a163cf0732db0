"""Breaks the program in small ways and says which breakages the tests let pass.  `make mutate`, WHERE=core or sample

core     core.py in every small way that there is: a sign, a factor, a swapped network, a wrong alpha, an off-by-one
         timestep, a missing detach; against tests/test_core.py
sample   the rest of the program in the ways that breakages.py lists, each against the tests that it names

One change at a time, each in a process of its own that has the libraries already; nothing on the disk is changed. Exit
code 1 if any change survives.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.machinery
import multiprocessing
import os
import sys
import types
from pathlib import Path

import pytest
import torch  # before the fork, so that mutants need not import it

import sbrush
from breakages import BREAKAGES

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "sbrush"
CORE, TESTS = SOURCE / "core.py", HERE / "test_core.py"
SECONDS = 120  # for one mutant; one that hangs counts as caught
# What imports all the libraries that the sample's tests need.
HEAVY = ("sbrush.training.plan", "sbrush.evaluate.coco.benchmark", "sbrush.benchmarks.training")

SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Eq: ast.NotEq, ast.Is: ast.IsNot,
}  # fmt: skip
TWINS = [
    ("alpha", "sigma"), ("eps_teacher", "eps_lora"), ("eps_cond", "eps_null"), ("cond", "null"), ("x0", "gap"),
    ("noise", "x0"), ("output", "x_t"), ("eps_lora", "noise"),
]  # fmt: skip


def mutants(tree):
    """Each mutated tree with a line that says what was done to it."""
    even = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("pow", "abs")}
    for index, node in enumerate(ast.walk(tree)):
        for what, change in changes(node):
            if what.endswith("the other way round") and isinstance(node.op, ast.Sub) and id(node) in even:
                continue  # the sign is lost in a square: the same algebra
            mutated = copy.deepcopy(tree)
            twin = next(n for i, n in enumerate(ast.walk(mutated)) if i == index)
            change(twin)
            yield f"line {getattr(node, 'lineno', '?')}: {what}", ast.unparse(ast.fix_missing_locations(mutated))


def changes(node):
    """The ways to break one node: (what, function that does it to the node's copy)."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield f"{ast.unparse(node)}: another operator", lambda n: setattr(n, "op", SWAPPED[type(n.op)]())
        if isinstance(node.op, ast.Sub | ast.Div):

            def exchange(n):
                n.left, n.right = n.right, n.left

            yield f"{ast.unparse(node)}: the other way round", exchange
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        yield f"{ast.unparse(node)}: negated", lambda n: n.ops.__setitem__(0, SWAPPED[type(n.ops[0])]())
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield f"{node.value}: one more", lambda n: setattr(n, "value", n.value + 1)
        if node.value not in (0, 1e-6):
            yield f"{node.value}: twice", lambda n: setattr(n, "value", n.value * 2)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in ("detach", "pow", "sqrt", "abs", "clamp"):
            yield f"{ast.unparse(node)}: without {node.func.attr}", without_call
        if node.func.attr == "mean":
            yield f"{ast.unparse(node)}: sum for mean", lambda n: setattr(n.func, "attr", "sum")
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.expr):
        for twins in TWINS:
            for one, other in (twins, twins[::-1]):
                if any(isinstance(n, ast.Name) and n.id == one for n in ast.walk(node.value)):
                    yield f"{ast.unparse(node)}: {other} for {one}", lambda n, a=one, b=other: rename(n, a, b)


def without_call(node):
    inner = node.func.value
    node.func, node.args, node.keywords = ast.Name("_same", ast.Load()), [inner], []


def rename(node, one, other):
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and n.id == one:
            n.id = other


def survives(source):
    """Whether the tests pass with core.py replaced by this source. Runs in a process of its own."""
    torch.set_num_threads(1)
    module = types.ModuleType("sbrush.core")
    module._same, module.__file__ = lambda x: x, str(CORE)
    sys.modules["sbrush.core"] = sbrush.core = module
    try:
        exec(compile(source, str(CORE), "exec"), module.__dict__)
    except Exception:
        return False
    return tests_pass([TESTS]) == 0


def tests_pass(tests):
    """pytest's exit code: 0 if they pass, 1 if one fails, others if they could not be run."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return int(
            pytest.main([*map(str, tests), "-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"])
        )


def core_cases():
    """(what is broken, source) of each mutant of core.py."""
    return list(mutants(ast.parse(CORE.read_text(encoding="utf-8"))))


def sample_cases():
    """(what is broken, (file, its source, tests)) of each breakage; ends the program if one is out of date."""
    cases, stale = [], []
    for name, rows in BREAKAGES.items():
        file = SOURCE / name
        source = file.read_text(encoding="utf-8")
        for old, new, tests in rows:
            what = f"{name}: {' '.join(old.split())}"
            if (times := source.count(old)) != 1:
                stale.append(f"{what!r} stands there {times} times")
            cases.append((what, (str(file), source.replace(old, new), tests.split())))
    if stale:
        sys.exit("\n".join(["tests/breakages.py is out of date: bring these up to the source as it is now", *stale]))
    return cases


def sample_survives(broken):
    """Whether the tests pass with a file of the package replaced by another source. Runs in a process of its own.

    RuntimeError if they could not be run: that is no test which has noticed anything.
    """
    file, source, tests = broken
    torch.set_num_threads(1)
    real = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader, name):
        return compile(source, file, "exec") if loader.path == file else real(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code
    code = tests_pass([HERE / test for test in tests])
    if code not in (0, 1):
        raise RuntimeError(f"pytest's exit code {code}: {' '.join(tests)}")
    return code == 0


def preload():
    """Imports the libraries, so that no process has to, and forgets the package itself."""
    for name in HEAVY:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "sbrush"]:
        del sys.modules[name]


def main(where="core", processes=None, only=""):
    if where == "core":
        cases, alone, whole = core_cases(), survives, [CORE.read_text(encoding="utf-8")]
    else:
        cases, alone = [case for case in sample_cases() if only in case[0]], sample_survives
        whole = [("", "", [test]) for test in sorted({test for _, (_, _, tests) in cases for test in tests})]
        preload()
    alive = []
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count(), maxtasksperchild=1) as pool:
        if not all(pool.map(alone, whole, chunksize=1)):
            sys.exit("the tests fail on the program as it is: nothing can be learnt from breaking it")
        running = [(what, pool.apply_async(alone, [case])) for what, case in cases]
        for done, (what, result) in enumerate(running, 1):
            try:
                passed = result.get(SECONDS * len(cases))
            except multiprocessing.TimeoutError:
                passed = False
            print(f"{done}/{len(cases)}  {'SURVIVES' if passed else 'caught  '}  {what}", flush=True)
            alive += [what] * passed
    print(f"\n{len(cases) - len(alive)} of {len(cases)} breakages of {where} are caught")
    for what in alive:
        print(f"  survives: {what}")
    return bool(alive)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("where", choices=("core", "sample"), nargs="?", default="core")
    arguments.add_argument("--processes", type=int, help="at once; default: as many as there are cores")
    arguments.add_argument("--only", default="", help="of the sample: breakages whose file or text holds this")
    given = arguments.parse_args()
    sys.exit(main(given.where, given.processes, given.only))
