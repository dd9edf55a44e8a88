"""The rooms of the package, and who may open whose door."""

import ast
from pathlib import Path

import pytest

import sb3_mbpo

PACKAGE = Path(sb3_mbpo.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py")} | {"hyperparams": PACKAGE / "hyperparams" / "__init__.py"}
#: Data flows down this list. A room may import from those below it, never from its own line or above.
FLOORS = [
    {"__init__", "checkpoint", "zoo"},
    {"run_state", "dhmbpo"},
    {"mbpo"},
    {"callback", "resumable", "double_horizon"},
    {"fit", "imagination", "buffers", "update"},
    {"dynamics", "observations", "closed_form"},
    {"ensemble", "scaler", "tasks"},
    {"rules", "schedules", "storage", "streams", "products", "activations", "policies", "imagined_buffer", "hyperparams"},
    {"type_aliases"},
]
#: One iteration, from file to file: no more than these seven need to be opened.
WALK = {"mbpo": {"callback", "fit", "imagination", "buffers", "update"}, "fit": {"dynamics"}, "imagination": {"dynamics"}}


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports at run time, not for type checkers only."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("sb3_mbpo") for alias in node.names), f"{path.name}: import it by `from`"
        if isinstance(node, ast.ImportFrom) and id(node) not in guarded:
            assert node.level == 0, f"{path.name}: relative import"
            if node.module and node.module.split(".")[0] == "sb3_mbpo":
                found |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    return found


def test_every_module_has_a_floor():
    assert set(MODULES) == set().union(*FLOORS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down_only(module):
    floor = next(index for index, floor in enumerate(FLOORS) if module in floor)
    below = set().union(*FLOORS[floor + 1 :])
    assert imports(MODULES[module]) <= below


def test_the_core_knows_no_leaf():
    leaves = {"benchmark", "zoo", "hyperparams"}
    assert not any(imports(path) & leaves for name, path in MODULES.items() if name != "zoo")


def test_buffers_know_no_network():
    assert imports(MODULES["buffers"]) == {"imagined_buffer", "observations", "type_aliases"}


def test_one_iteration_can_be_read_at_one_sitting():
    assert len(set(WALK).union(*WALK.values())) <= 7
    for module, steps in WALK.items():
        assert steps <= imports(MODULES[module])
    for module, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 350, f"{module} has become too long"
