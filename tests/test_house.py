"""Which part of the package may import which, as CONTRIBUTING.md says."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "clipvip"
# Each part with those that it may import. Every part may import TOOLS, which import no part.
PARTS = {
    "ops": (),
    "losses": ("ops",),
    "data": ("ops",),
    "model": ("data.video", "losses", "ops"),
    "embedding": ("model", "data", "losses", "ops"),
    "convert": ("model",),
    "explain": ("embedding", "model", "data"),
    "export": ("embedding", "model"),
    "collection": ("data",),
    "classify": ("embedding", "model", "data", "collection"),
    "captions": ("embedding", "model", "data", "losses"),
    "index": ("embedding", "model", "data", "losses", "collection"),
    "serve": ("index", "data"),
    "training": ("embedding", "model", "data", "losses", "ops"),
    "cli": (
        "serve",
        "index",
        "captions",
        "classify",
        "explain",
        "export",
        "training",
        "convert",
        "data",
        "ops",
    ),
}
TOOLS = ("files", "inputs", "retrieval", "sentences", "terminal")
IN_PART = {
    "explain_picture": "explain",
    "token_files": "index",
    "distributed": "losses",
    "sharded": "losses",
    "export_files": "export",
    "doctor": "cli",
    "benchmark": "cli",
    "configs": "training",
    "_C": "ops",
}
WINGS = ("video", "loading", "shards")  # of data; each may import those before it


def modules() -> dict[str, Path]:
    """Name of each module of the package, without the package's own, and its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found | {"_C": PACKAGE / "_C.pyi"}


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in its file."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [x.removeprefix("clipvip.") in MODULES for x in whole]
            wanted = [x if y else str(node.module) for x, y in zip(whole, known, strict=True)]
        else:
            continue
        yield from (x.removeprefix("clipvip.") for x in wanted if x.startswith("clipvip."))


def part(name: str) -> str:
    head = name.partition(".")[0]
    return head if head in TOOLS else IN_PART.get(head, head)


def wing(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "data" and len(parts) > 1 and parts[1] in WINGS else None


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_part_imports_only_the_parts_below_it(name):
    mine = part(name)
    assert mine in PARTS or mine in TOOLS, f"{name} belongs to no part"
    for other in imported(name):
        theirs = part(other)
        if theirs == mine or theirs in TOOLS:
            continue
        allowed = PARTS.get(mine, ())
        of_wing = theirs == "data" and f"data.{wing(other)}" in allowed
        assert theirs in allowed or of_wing, f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_folder_of_data_is_entered_by_its_face_alone(name):
    for other in imported(name):
        theirs = wing(other)
        if theirs is None or theirs == wing(name):
            continue
        through_face = other == f"data.{theirs}"
        assert through_face, f"{name} imports {other}; import the name from clipvip.data.{theirs}"
        mine = wing(name)
        if mine is not None:
            assert WINGS.index(theirs) < WINGS.index(mine), f"{name} imports {other}"


def test_search_needs_no_training():
    needed, queue = set(), ["index"]
    while queue:
        name = queue.pop()
        if name in MODULES and name not in needed:
            needed.add(name)
            queue += imported(name)
    assert "embedding" in needed
    assert not {name for name in needed if part(name) == "training"}


def test_no_modules_import_each_other():
    faces = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {name: set(imported(name)) - {name} for name in MODULES}
    for name in graph:  # a module of a folder is loaded after the folder's face began
        graph[name] -= {face for face in faces if name.startswith(face + ".")}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them


def test_the_file_map_names_each_module_once_and_no_other():
    named, folder = [], None
    for line in (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"### `(.+)/`", line):
            folder = heading[1]
        elif line.startswith("#"):
            folder = None
        elif folder and folder.split("/")[0] == PACKAGE.name:
            named += [f"{folder}/{name}" for name in re.findall(r"^\| `([^`]+)` \|", line)]
    there = [str(path.relative_to(PACKAGE.parent)) for path in MODULES.values()]
    assert sorted(named) == sorted(there)
