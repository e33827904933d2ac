"""How the package is built: who imports whom, what is public, what importing costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_continual

PACKAGE = Path(lightning_continual.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NUMERICS = (
    *("parameters", "memory", "metrics", "importance", "constraints", "bandits", "compression", "capacity", "heads"),
    *("ownership", "packed", "search", "_batch"),
)
GLUE = ("stream", "data", "callbacks", "selection", "comparison", "_host", "cli", "demo")

LONG = {
    "callbacks/adaptive_compression.py": "the search at the boundary beside what a task sees, behind one constructor",
    "callbacks/bandit_selection.py": "both selections behind one constructor, whose every argument is documented",
    "callbacks/clnp.py": "one constructor, whose every argument is documented, and what is done when",
    "memory/memory.py": "drawing, shares of processes and state, each with its docstring",
    "metrics.py": "one formula a function, each with its docstring; and the metric that collects the matrix",
    "stream.py": "the boundary and both ways to reach it",
    "tasks.py": "all ways to make a stream, each with its docstring",
}

over_files = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])


def name_of(file: Path) -> str:
    """Return the module of a file, without the package: ``callbacks.rehearsal``."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import in a file, wherever it stands; an empty name for a whole module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["lightning_continual", *name_of(file).split(".")][: -node.level or None]
            module = ".".join([*(package if node.level else []), *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def own_imports(file: Path) -> set[str]:
    """Return the modules of ours that a file imports."""
    found = set()
    for module, name in imports(file):
        if module.partition(".")[0] != "lightning_continual":
            continue
        path = PACKAGE.joinpath(*module.split(".")[1:], name)
        is_module = name and (path.with_suffix(".py").is_file() or path.is_dir())
        found.add(".".join([*module.split(".")[1:], *([name] if is_module else [])]))
    return found


def within(module: str, parents: tuple[str, ...]) -> bool:
    return module.split(".")[0] in parents


@over_files
def test_numerics_have_never_heard_of_lightning(file: Path) -> None:
    if not within(name_of(file), NUMERICS):
        return
    hosts = {module for module, _ in imports(file) if module.split(".")[0] in ("lightning", "pytorch_lightning")}
    assert not hosts
    assert not {module for module in own_imports(file) if within(module, GLUE)}


def test_the_numerics_are_there() -> None:
    found = {name_of(file).split(".")[0] for file in FILES}
    assert {"parameters", "memory", "metrics", "importance", "_batch"} <= found


@over_files
def test_callbacks_do_not_import_each_other(file: Path) -> None:
    name = name_of(file)
    if not name.startswith("callbacks."):
        return
    assert not {one for one in own_imports(file) if one.startswith("callbacks.") and one != name}


@over_files
def test_only_one_place_knows_lightnings_private_parts(file: Path) -> None:
    if within(name_of(file), ("_host",)):
        return
    private = [
        f"{module}.{name}"
        for module, name in imports(file)
        if module.split(".")[0] in ("lightning", "pytorch_lightning")
        and (
            module.startswith(("lightning.pytorch.trainer.", "lightning.pytorch.loops"))
            or any(part.startswith("_") for part in [*module.split("."), name])
        )
    ]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    reached = [
        f"line {node.lineno}: trainer.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "trainer"
        and (node.attr.startswith("_") or node.attr.endswith("_loop"))
    ]
    assert not private + reached


@over_files
def test_nothing_is_printed_and_nothing_is_left_to_do(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not re.findall(r"\b(?:TODO|FIXME|XXX)\b", text)


@over_files
def test_no_path_of_a_machine_is_in_the_code(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.findall(r"""["'`\s](?:/(?:home|Users|root|work|tmp|opt|mnt|data|var)/|[A-Z]:\\)""", text)


@over_files
def test_a_file_is_short_or_has_a_reason(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= 400 or str(file.relative_to(PACKAGE)) in LONG, f"{lines} lines: split it, or say why not in `LONG`"


def test_every_reason_for_length_is_still_one() -> None:
    lines = {name: len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in LONG}
    assert all(number > 400 for number in lines.values()), lines


@over_files
def test_no_file_is_named_for_odds_and_ends(file: Path) -> None:
    assert file.stem.strip("_") not in ("utils", "base", "common", "helpers", "misc")


def test_public_names_are_sorted() -> None:
    assert lightning_continual.__all__ == sorted(set(lightning_continual.__all__))


@pytest.mark.parametrize("name", lightning_continual.__all__)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(lightning_continual, name)
    assert inspect.getdoc(public)
    if not inspect.isclass(public):
        return
    own = [
        (method, getattr(value, "fget", None) or getattr(value, "__func__", value))
        for base in public.__mro__
        if base.__module__.startswith("lightning_continual")
        for method, value in vars(base).items()
        if not method.startswith("_") and (callable(value) or isinstance(value, property | classmethod | staticmethod))
    ]
    assert not [method for method, value in own if not inspect.getdoc(value)]


@pytest.mark.parametrize("name", [name_of(file) for file in FILES if file.stem != "__main__"])
def test_every_module_says_what_it_is_for(name: str) -> None:
    module = importlib.import_module(f"lightning_continual.{name}".rstrip("."))
    assert module.__doc__


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_importing_loads_no_extra_and_costs_little() -> None:
    code = """
import json, sys, time
import lightning
before = set(sys.modules)
start = time.process_time()  # not the clock's: other tests may run
import lightning_continual
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""
    extras = "wandb", "avalanche", "optuna", "sklearn", "torch_pruning", "torchao", "jsonargparse", "matplotlib"
    seconds = [math.inf]
    while min(seconds) >= 0.3 and len(seconds) <= 4:  # the first import of all may compile
        one, loaded = json.loads(in_a_fresh_process(code))
        seconds.append(one)
        assert not [module for module in loaded if module.partition(".")[0] in extras]
    assert min(seconds) < 0.3, seconds
