"""What imports what, read from the sources: no circles, and nothing imports what stands above it."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pearl", "pearl_kernels", "bench")


def import_graph(root: Path, *packages: str) -> dict[str, set[str]]:
    """Each module's imports among the modules of ``packages``, those in functions and for type checkers too.

    ``from a import b`` is an import of ``a.b`` where that is a module, and not of ``a``.
    """
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in packages
        for pattern in ("*.pyi", "*.py")  # of a compiled module there is the stub
        for path in (root / package).rglob(pattern)
    }
    return {name: {*_imports(path, files.keys())} & files.keys() for name, path in files.items()}


def _imports(path: Path, modules: Container[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; name the package"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules else node.module


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph(ROOT, *PACKAGES)


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_module_imports_itself_through_others(graph: dict[str, set[str]]) -> None:
    assert len(graph) > 150
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("package", "below"),
    [
        ("pearl_kernels", ("pearl_kernels",)),
        ("pearl", ("pearl", "pearl_kernels")),
        ("bench.gpu_suite", ("bench.gpu_suite",)),  # starts where neither pearl nor torch can be imported
    ],
)
def test_a_package_imports_what_stands_below_it(
    graph: dict[str, set[str]], package: str, below: tuple[str, ...]
) -> None:
    def inside(module: str, packages: tuple[str, ...]) -> bool:
        return f"{module}.".startswith(tuple(f"{name}." for name in packages))

    modules = [module for module in graph if inside(module, (package,))]
    assert len(modules) > 5
    assert [(module, name) for module in modules for name in graph[module] if not inside(name, below)] == []


def test_what_is_served_knows_nothing_of_the_service(graph: dict[str, set[str]]) -> None:
    above = ("pearl.serving", "pearl.cli", "bench")
    served = [module for module in graph if not f"{module}.".startswith(tuple(f"{name}." for name in above))]
    assert "pearl.engine.engine" in served
    assert any(name.startswith("pearl.serving") for name in graph)
    assert [(module, name) for module in served for name in graph[module] if name.startswith("pearl.serving")] == []


@pytest.mark.parametrize(
    ("sentence", "found"),
    [
        ("import house.door", True),
        ("from house.door import opens", True),
        ("def later():\n    from house import door", True),
        ("if TYPE_CHECKING:\n    from house.door import Handle", True),
        ("from house import NAME", True),
        ("import door", False),
    ],
)
def test_a_circle_is_found(tmp_path: Path, sentence: str, found: bool) -> None:
    house = tmp_path / "house"
    house.mkdir()
    (house / "__init__.py").write_text("from house import door\n")
    (house / "door.py").write_text("import os\nfrom house import wall\n")
    (house / "wall.py").write_text(sentence)
    assert bool(circle(import_graph(tmp_path, "house"))) is found
