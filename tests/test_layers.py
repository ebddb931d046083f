"""Imports point down only, and nothing imports the loaders under their folder's name."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = {
    # ground
    "danet": 0,
    "danet.types": 0,
    "danet.errors": 0,
    "danet.seeds": 0,
    "danet.plain": 0,
    "danet.memory": 0,
    "danet.console": 0,
    "danet.interpreter": 0,
    # single concerns
    "danet.ops": 1,
    "danet.distributed": 1,
    "danet.filesystem": 1,
    "danet.extras": 1,
    "danet.bands": 1,
    "danet.checkpoint": 2,
    "danet.models": 3,
    "danet.losses": 3,
    "danet.data": 3,
    "danet.evaluation": 3,
    "danet.datasets": 4,
    "danet.engine": 4,
    "danet.config": 5,
    "danet.visualization": 5,
    "danet.prediction": 6,
    "danet.export": 6,
    "danet.data_check": 6,
    "danet.preflight": 6,
    "danet.cli": 6,
    "danet.engine.run": 7,
    "tools": 8,
}
"""Rooms by floor. Rooms of one floor do not know each other."""
SATELLITES = {
    f"danet.{name}" for name in ("data_check", "export", "prediction", "preflight", "visualization")
}
"""Rooms without which a training, an evaluation and a resumed run would still compute the same."""
MAY_USE_SATELLITES = {"danet.engine.run", "tools", *SATELLITES}


def files():
    for folder in ("danet", "datasets", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            linked = path.relative_to(ROOT).parts[:2]
            if linked not in {("danet", "datasets"), ("danet", "tools"), ("danet", "configs")}:
                yield path


def module_of(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "datasets":
        parts.insert(0, "danet")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in FLOORS and (name != "danet" or module == "danet"):
            return name
    raise AssertionError(f"{module} has no floor: give it one here and in docs/design.md")


def imports(path):
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "danet":
                yield from (f"danet.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", list(files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room_of(module_of(path))
    for name in imports(path):
        assert name.split(".")[0] != "datasets", f"{path}: import danet.datasets instead"
        if name.split(".")[0] != "danet" or (path.name == "__init__.py" and here == "danet"):
            continue
        there = room_of("danet" if name == "danet.__version__" else name)
        assert there == here or FLOORS[there] < FLOORS[here], f"{here} imports {name}"


def test_the_core_imports_no_satellite():
    rooms = {}
    for path in files():
        if module_of(path) != "danet":  # danet.predict is imported when it is called
            rooms.setdefault(room_of(module_of(path)), set()).update(imports(path))
    assert rooms.keys() >= SATELLITES
    users = {
        room
        for room, names in rooms.items()
        if any(name.startswith(f"{satellite}.") for name in names for satellite in SATELLITES)
    }
    assert users <= MAY_USE_SATELLITES
    assert "danet.engine.run" in users


def test_the_folder_of_the_loaders_can_shadow_nobody():
    for folder in ("datasets", "configs", "tools"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / "danet" / folder).resolve() == ROOT / folder


def test_there_is_no_module_for_odds_and_ends():
    names = {path.stem for path in files()}
    assert not names & {"utils", "util", "helpers", "misc", "common", "registry", "hooks"}


@pytest.mark.parametrize("modules", ["danet", "danet.config.validate, danet.cli"])
def test_neither_the_package_nor_checking_a_config_waits_for_torch(modules):
    heavy = "{'torch', 'cv2', 'albumentations'}"
    code = f"import sys, {modules}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
