"""Three rooms and one direction: dags → plugins → include, and a sandbox that shares no code with the client side."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST, ROOT


def imports(file: Path) -> set[str]:
    """Return the modules that a file imports anywhere in it, those that only type checkers see included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=module, level=0, names=names) if module is not None:
                found |= {module, *(f"{module}.{alias.name}" for alias in names)}
            case ast.ImportFrom(level=level) if level > 0:
                # Relative imports are resolved by where a file stands; the project has none, and this test relies on it.
                found.add("a relative import")
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(
                function
            ).endswith(("import_module", "__import__")):
                found.add(name)
    return found


def python_files(folder: str) -> Iterator[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file"
    yield from files


def offenders(folder: str, forbidden: set[str]) -> list[str]:
    """Return which files of a folder import a forbidden module or something inside it."""
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in python_files(folder)
        for name in sorted(imports(file))
        if any(name == module or name.startswith(f"{module}.") for module in forbidden)
    ]


def top_level_modules(folder: str) -> set[str]:
    """Return the names under which what stands directly in a folder can be imported, when the folder is on the path."""
    return {
        path.stem
        for path in (ROOT / folder).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        (
            "include",
            {"airflow", "plugins", "dags", "tests", "demo"}
            | top_level_modules("plugins")
            | top_level_modules("dags"),
        ),
        ("plugins", {"dags", "tests", "demo"} | top_level_modules("dags")),
        # Under this name the package would exist twice: once here, once on the path that holds plugins/.
        ("plugins", {"plugins"}),
        ("dags", {"plugins", "tests", "demo"}),
        ("include/sandbox", {"include.payroc", "include.refunds"}),
        ("include/payroc", {"include.sandbox", "include.refunds"}),
        ("include/refunds", {"include.sandbox"}),
        (".", {"payroc"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_file_imports_from_a_room_that_it_must_not_know(folder: str, forbidden: set[str]) -> None:
    if folder == ".":
        # Payroc's own SDK owns the name; a file that imports it would work only where the SDK is installed.
        folders = [
            path.name
            for path in ROOT.iterdir()
            if path.is_dir() and not path.name.startswith(".") and any(path.rglob("*.py"))
        ]
        assert {"dags", "plugins", "include", "tests"} <= set(folders)
        assert [line for name in folders for line in offenders(name, forbidden)] == []
    else:
        assert offenders(folder, forbidden) == []


def test_the_walk_sees_an_import_wherever_it_hides(tmp_path: Path) -> None:
    file = tmp_path / "hiding.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from airflow.sdk import Context\n"
        "def late():\n    import dags.payroc_refunds\n    importlib.import_module('payroc')\n"
        "from include import sandbox\n"
        "from . import near\n"
    )
    assert imports(file) >= {
        "airflow.sdk",
        "dags.payroc_refunds",
        "payroc",
        "include.sandbox",
        "a relative import",
    }


def test_no_file_of_the_project_imports_relatively() -> None:
    assert [
        line for folder in ("dags", "plugins", "include") for line in offenders(folder, {"a relative import"})
    ] == []


def test_the_plugin_loader_is_told_to_leave_the_package_alone() -> None:
    assert "payroc_airflow/" in (ROOT / "plugins" / ".airflowignore").read_text(encoding="utf-8").splitlines()


def test_airflows_plugin_loader_finds_no_error_and_puts_no_file_of_ours_in_another_modules_place() -> None:
    # The loader executes each file that it finds as a top-level module named by the file's stem.
    stems = {file.stem for file in (ROOT / "plugins" / "payroc_airflow").rglob("*.py")} - {"__init__"}
    code = f"""
import sys, sysconfig
from airflow import plugins_manager
plugins_manager.ensure_plugins_loaded()
assert plugins_manager.get_import_errors() == {{}}, plugins_manager.get_import_errors()
assert "payroc_refunds" in [plugin.name for plugin in plugins_manager._get_plugins()[0]]
import http
assert sys.modules["http"].__file__.startswith(sysconfig.get_path("stdlib")), sys.modules["http"].__file__
package = {str(ROOT / "plugins" / "payroc_airflow")!r}
taken = [name for name in {sorted(stems)!r} if str(getattr(sys.modules.get(name), "__file__", "")).startswith(package)]
assert taken == [], taken
"""
    # In a process of its own: Airflow loads its plugins once for each, and what the loader did to this one could not be told.
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_files_that_start_first_are_there() -> None:
    assert [name for name in LONGEST_FIRST if not (ROOT / name).is_file()] == []
