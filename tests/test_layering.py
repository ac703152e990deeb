"""Imports go one way; data never sees JAX, models never see files or settings."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import videomae_jax
from videomae_jax.keys import TASKS

PACKAGE = ROOT / "videomae_jax"
# Folder or module -> what of the package it may import (docs/architecture.md draws the same).
MAY = {
    "keys": set(),
    "config": {"keys"},
    "hardware": set(),
    "pages": set(),
    "sharding": set(),
    "storage": set(),
    "models": {"models"},
    "data": {"data", "storage"},
    "hosts": {"config", "data", "storage"},
    "evaluation": {"evaluation", "models"},
    "interop": {"interop", "models", "storage"},
    "apps": {
        *("apps", "config", "data", "evaluation", "hardware", "hosts", "interop", "models", "sharding"),
        *("pages", "storage"),
    },
    "training": {
        *("training", "apps", "config", "data", "evaluation", "hardware", "hosts", "interop", "keys"),
        *("models", "sharding", "storage"),
    },
    "tasks": {
        *("keys", "tasks", "training", "apps", "config", "data", "evaluation", "hosts", "interop", "models"),
        *("sharding", "storage"),
    },
    "study": {"study", "config", "data", "storage"},
    "commands": {
        *("tasks", "training", "apps", "config", "data", "evaluation", "hosts", "interop", "sharding"),
        *("storage", "study"),
    },
    "cli": {"commands", "pages", "config", "data", "evaluation", "interop"},
    "__main__": {"cli"},
    "__init__": {"interop", "models"},
}
FOREIGN = {
    "data": {"jax", "flax", "optax", "orbax", "ml_collections", "torch", "tensorflow"},
    "models": {"orbax", "ml_collections", "av", "PIL", "pathlib", "os", "time", "torch", "tensorflow"},
}
NNX = {"Module", "Param", "LayerNorm", "Rngs", "vmap", "split", "merge", "eval_shape"}
NNX |= {"to_pure_dict", "graphdef", "state", "initializers"}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def part(path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path) -> set[str]:
    """Every module that a file imports, by full name; of the package, with the imported names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports(path):
    names = imported(path)
    ours = {name.split(".")[1] for name in names if name.startswith("videomae_jax.")}
    assert ours <= MAY[part(path)]
    assert not {name.split(".")[0] for name in names} & FOREIGN.get(part(path), set())


def test_the_table_is_complete_and_goes_one_way():
    assert {part(path) for path in files()} == set(MAY)
    order = list(MAY)
    for name, allowed in MAY.items():
        assert all(order.index(other) <= order.index(name) for other in allowed)


def test_no_method_imports_another_and_the_machinery_knows_none():
    methods = set(TASKS)
    for path in files():
        names = {name for name in imported(path) if name.startswith("videomae_jax.tasks.")}
        used = {name.split(".")[2] for name in names} & methods
        if part(path) == "training":
            text = path.read_text()
            assert not re.search(r"config\.task ==|isinstance\(.*[tT]ask", text), path
            assert not used, path
        elif part(path) == "tasks" and path.stem in methods:
            assert not used, path


def test_only_the_stable_part_of_nnx_is_used():
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "nnx"
            ):
                assert node.attr in NNX, f"{path}: nnx.{node.attr}"


def test_files_are_short():
    for path in files():
        assert len(path.read_text().splitlines()) <= 450, path


def test_reading_videos_imports_no_jax():
    """Encoders of `prepare` are processes of their own, which start in a fraction of JAX's import time."""
    script = "import sys, videomae_jax.data.prepare; print('jax' in sys.modules, 'tensorflow' in sys.modules)"
    words = [sys.executable, "-c", script]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == "False False\n"


def test_public_names():
    assert {name: getattr(videomae_jax, name).__name__ for name in videomae_jax.__all__ if name != "SIZES"}
    assert "base" in videomae_jax.SIZES
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        videomae_jax.nothing  # noqa: B018
