"""The order of the folders: imports go one way, also those inside functions."""

import ast
from functools import cache
from itertools import pairwise
from pathlib import Path

from pipeline.core.settings import ROOT

LEVELS = {"core": 0, "engines": 1, "inputs": 2, "image": 3}
LEVELS |= dict.fromkeys(("smoke", "release", "stack", "host"), 4)
LEVELS |= {"task_context": 5, "bench": 6, "tasks": 7, "stacks": 7, "releases": 7}


def product() -> dict[str, ast.Module]:
    """Return the syntax tree of each Python file of the product by its path; some scripts have no
    suffix.
    """
    folders = [ROOT / name for name in ("pipeline", "scripts", "bench")]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*"))]
    trees = {}
    for path in paths:
        if path.is_file() and (path.suffix == ".py" or _is_python_script(path)):
            trees[str(path.relative_to(ROOT))] = ast.parse(path.read_bytes())
    return trees


def _is_python_script(path: Path) -> bool:
    first = path.read_bytes().partition(b"\n")[0]
    return not path.suffix and first.startswith(b"#!") and b"python" in first


def imported(tree: ast.Module) -> set[str]:
    """Return the full names of what a file imports: modules, and what is imported from them."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def level(module: str) -> int:
    return LEVELS[module.removeprefix("pipeline.").split(".")[0]]


def graph() -> dict[str, set[str]]:
    """Return for each module of the pipeline and the tasks the modules of ours that it imports."""
    trees = {
        module_name(path): tree
        for path, tree in product().items()
        if not path.startswith("scripts/") and not path.endswith("__init__.py")
    }
    return {name: imported(tree) & trees.keys() for name, tree in trees.items()}


def test_no_import_goes_upward_or_sideways() -> None:
    upward = set()
    for module, others in graph().items():
        for other in others:
            same_folder = module.rpartition(".")[0] == other.rpartition(".")[0]
            if level(other) > level(module) or (level(other) == level(module) and not same_folder):
                upward.add(f"{module} -> {other}")
    assert upward == set()


def test_no_cycle_and_at_most_ten_files_in_a_chain() -> None:
    imports = graph()
    active: list[str] = []

    @cache
    def longest(module: str) -> tuple[str, ...]:
        assert module not in active, [*active, module]
        active.append(module)
        chains = [longest(other) for other in sorted(imports[module])]
        active.pop()
        return (module, *max(chains, key=len, default=()))

    chain = max((longest(module) for module in imports), key=len)
    assert all(later in imports[earlier] for earlier, later in pairwise(chain))
    assert len(chain) <= 10, chain


def test_scripts_and_pipeline_know_nothing_of_each_other() -> None:
    scripts = {path: tree for path, tree in product().items() if path.startswith("scripts/")}
    assert len(scripts) > 5
    for path, tree in scripts.items():
        assert not {name for name in imported(tree) if name.startswith("pipeline")}, path
    for module, tree in product().items():
        if module not in scripts:
            assert not {name for name in imported(tree) if name.startswith("scripts")}, module


def test_no_import_has_an_alias() -> None:
    aliases = set()
    for path, tree in product().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                aliases |= {(path, alias.asname) for alias in node.names if alias.asname}
    assert aliases == set()
