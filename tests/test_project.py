"""What is said about the project is so: bounds, file tree, house rules."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "sbrush"


def imports(file):
    """The modules that a file imports at module level."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_core_imports_only_torch():
    allowed = ("__future__", "collections", "dataclasses", "itertools", "typing", "torch")
    assert all(name.split(".")[0] in allowed for name in imports(SOURCE / "core.py"))


def test_nothing_imports_the_command_line():
    for file in SOURCE.rglob("*.py"):
        if file.parent.name != "cli" and file.name != "__main__.py":
            assert not any(name.startswith("sbrush.cli") for name in imports(file)), file


def test_distill_sample_and_eval_share_the_core():
    assert "sbrush.core" in " ".join(imports(SOURCE / "sampling" / "generation.py"))
    assert "sbrush.core" in " ".join(imports(SOURCE / "training" / "methods" / "vsd.py"))
    assert "sbrush.sampling.generation" in " ".join(imports(SOURCE / "evaluate" / "candidates.py"))


def test_nothing_is_unpickled():
    for file in SOURCE.rglob("*.py"):
        assert not re.search(
            r"(from|import) pickle|pickle\.loads?\(|torch\.load\((?![^)]*weights_only=True)|allow_pickle",
            file.read_text(encoding="utf-8"),
        ), file


def test_the_lower_bounds_that_ci_installs_are_the_declared_ones():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (ROOT / ".github" / "lower-bounds.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [d.replace(">=", "==") + ".*" for d in declared]


def test_every_recipe_is_described():
    from sbrush.training import recipes

    assert all(re.search(rf"^{name} ", recipes.__doc__, re.M) for name in recipes.RECIPES)
