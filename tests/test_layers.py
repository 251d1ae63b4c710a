"""Who may import whom: folders in one order, no circles, and masks and storage without TensorFlow and Keras."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import freezeops

PACKAGE = Path(freezeops.__file__).parent

LAYERS = (
    ("_version", "messages", "notices", "backend"),
    ("masks",),
    ("storage",),
    ("ops",),
    ("keras_compat",),
    ("partitions",),
    ("backward",),
    ("slots",),
    ("step",),
    ("registry",),
    ("files",),
    ("assembly",),
    ("optimizer", "legacy", "transforms"),
    ("__init__", "__main__", "mask"),
)
"""Folders and modules of the package, bottom first: each may import from its own layer and from those before it."""

UPWARDS: set[tuple[str, str]] = set()
"""Imports that run the other way, for now. None may be added; one that is gone must be taken out."""

NUMPY_ONLY = ("masks", "storage")


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yields the module of each import, and the name that is taken out of it; not those for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name whole modules"
            yield from ((node.module or "", alias.name) for alias in node.names)
        yield from imports_of(node)


def module_name(path: Path, package: Path) -> str:
    """`masks.layout` for a file; `ops` for `ops/__init__.py`, and `__init__` for the package's own."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def read_package(package: Path) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """For each module, the modules of the package that it imports, and the other packages."""
    trees = {module_name(path, package): ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
    own: dict[str, set[str]] = {}
    others: dict[str, set[str]] = {}
    for module, tree in trees.items():
        own[module], others[module] = set(), set()
        for source, name in imports_of(tree):
            root, _, rest = source.partition(".")
            if root != package.name:
                others[module].add(root)
                continue
            longer = f"{rest}.{name}".strip(".")
            found = next((each for each in (longer, rest or "__init__") if each in trees), None)
            assert found is not None, f"{module} imports {source}, which is not there"
            own[module].add(found)
    return own, others


def layer_of(module: str) -> int:
    """The number of a module's layer."""
    folder = module.partition(".")[0]
    return next(i for i, layer in enumerate(LAYERS) if folder in layer)


def upwards(own: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports of modules from layers above."""
    return {(module, other) for module, found in own.items() for other in found if layer_of(other) > layer_of(module)}


def circles(own: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(own[module]):
            if other not in index:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1 or module in own[module]:
                found.append(sorted(group))

    for module in own:
        if module not in index:
            visit(module)
    return found


OWN, OTHERS = read_package(PACKAGE)


def test_every_module_has_a_layer():
    folders = {module.partition(".")[0] for module in OWN}
    assert folders == {folder for layer in LAYERS for folder in layer}


def test_imports_run_downwards():
    assert upwards(OWN) == UPWARDS


def test_no_modules_import_each_other():
    assert circles(OWN) == []


@pytest.mark.parametrize("folder", NUMPY_ONLY)
def test_numpy_is_all_that_they_import(folder):
    modules = {module for module in OWN if module.partition(".")[0] == folder}
    assert modules
    seen: set[str] = set()
    while modules:
        module = modules.pop()
        seen.add(module)
        assert OTHERS[module] - sys.stdlib_module_names <= {"numpy"}, module
        modules |= OWN[module] - seen


def test_masks_work_in_an_interpreter_without_tensorflow():
    """The package's own `__init__` imports everything, so an empty one takes its place."""
    modules = sorted(module for module in OWN if module.partition(".")[0] in NUMPY_ONLY)
    code = f"""
import importlib, sys, types
import numpy as np
package = types.ModuleType("freezeops")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["freezeops"] = package
for name in ("tensorflow", "keras", "tf_keras"):
    sys.modules[name] = None  # an import of it fails
for module in {modules}:
    importlib.import_module("freezeops." + module)
mask = sys.modules["freezeops.masks.where"].named_entries(np.s_[1:, 2], (3, 4))
stored = sys.modules["freezeops.storage.stored"]
record = sys.modules["freezeops.storage.stored_mask"].StoredMask("a/kernel", (3, 4), mask)
text = stored.Stored([record]).to_bytes()
print(stored.Stored.from_bytes(text, "here").masks[0].mask.indices().tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.stdout.strip() == "[6, 10]", done.stderr


def write(package: Path, **files: str) -> None:
    for name, text in files.items():
        path = package / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("PACKAGE", package.name))


def test_the_checks_find_what_they_look_for(tmp_path):
    """In a package made up for it: an import upwards inside of a function, a circle, and one for types alone."""
    package = tmp_path / "made_up"
    write(
        package,
        masks__a="from PACKAGE.masks import b\nimport numpy",
        masks__b="from PACKAGE.masks.c import name",
        masks__c="def f():\n    import PACKAGE.masks.a",
        storage__d="import os\ndef f():\n    from PACKAGE.step.e import name\n    import tensorflow as tf",
        step__e="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from PACKAGE.optimizer import f",
        optimizer="from PACKAGE.step import e",
    )
    own, others = read_package(package)
    assert upwards(own) == {("storage.d", "step.e")}
    assert circles(own) == [["masks.a", "masks.b", "masks.c"]]
    assert others["storage.d"] == {"os", "tensorflow"} and others["masks.a"] == {"numpy"}
    assert own["step.e"] == set()
