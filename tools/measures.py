"""How large the code is and how easy to read, counted from its syntax trees: names and
line breaks cost nothing there. And how deep the forward of a layer is.

    python tools/measures.py            mora_ds, tools and tests, as one table

Nodes leave out docstrings and the contexts Load, Store and Del. A line of code is one
that is neither empty nor only a comment or a docstring.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from traceback import FrameSummary, extract_stack
from types import FrameType

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import OperatorKind
from mora_ds.runtime.cli import table

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mora_ds", "tools", "tests")
VAGUE_NAMES = frozenset(
    (
        "deal", "each", "found", "given", "held", "kept", "made", "meet", "met", "other", "others", "own", "part",
        "parts", "place", "places", "rest", "thing", "things",
    )
)  # fmt: skip
"""Names that do not say what of the field they stand for."""
OPERATOR_KINDS = "OperatorKind"
"""The enumeration whose members tell one operator from another, as the classes whose
names end in Spec do."""
Measures = dict[str, float]


def main() -> None:
    measured = {package: measure(ROOT / package) for package in PACKAGES}
    layer = MoRALinear(nn.Linear(32, 32), OperatorSpec(OperatorKind.ROTATE, 32, 32, 8))
    measured["mora_ds"] |= {
        "flags of training": count_flags(ROOT / "mora_ds" / "config"),
        **forward_calls(layer, torch.ones(1, 32)),
    }
    print("\n".join(table(as_table(measured))))


def as_table(measured: dict[str, Measures]) -> list[list[str]]:
    """One row a measure, one column a package."""
    names = dict.fromkeys(name for measures in measured.values() for name in measures)
    rows = [["", *measured]]
    for name in names:
        values = [measures.get(name) for measures in measured.values()]
        rows.append(
            [name, *("" if value is None else f"{value:,}" for value in values)]
        )
    return rows


def measure(folder: Path) -> Measures:
    """{name of a measure: its value} over all modules under `folder`."""
    sources = [
        path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))
    ]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    lines = [line for source in sources for line in lines_of_code(source)]
    kinds = sum(asks_for_kind(node) for node in nodes)
    vague = [name for name in bound_names(nodes) if name.lstrip("_") in VAGUE_NAMES]
    assignments = [node for node in nodes if isinstance(node, ast.Assign)]
    packed = sum(is_packed(assignment) for assignment in assignments)
    return {
        "nodes of the syntax tree": count_nodes(nodes),
        "lines of code": len(lines),
        "functions": sum(isinstance(node, ast.FunctionDef) for node in nodes),
        "private attributes of others": sum(map(is_private, nodes)),
        "places that ask for an operator's kind": kinds,
        "names that say nothing, in 1,000 lines": round(
            1000 * len(vague) / len(lines), 1
        ),
        "assignments of several packed values, %": round(
            100 * packed / len(assignments), 1
        ),
    }


def count_flags(config: Path) -> int:
    """Flags of training: the fields of classes that the decorator `documented`
    marks."""
    flags = 0
    for path in config.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            marks = map(ast.unparse, getattr(node, "decorator_list", []))
            if isinstance(node, ast.ClassDef) and "documented" in marks:
                flags += sum(isinstance(field, ast.AnnAssign) for field in node.body)
    return flags


def forward_calls(layer: nn.Module, x: Tensor) -> Measures:
    """What layer(x) calls of mora_ds: how many functions how often, how many of them
    within each other, in how many files."""
    # The first call makes the tables
    layer(x)
    package = str(ROOT / "mora_ds")
    stacks: list[list[FrameSummary]] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and package in frame.f_code.co_filename:
            stacks.append(
                [call for call in extract_stack(frame) if package in call.filename]
            )

    sys.setprofile(profile)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    calls = [stack[-1] for stack in stacks]
    return {
        "a forward: calls": len(calls),
        "a forward: functions": len({(call.filename, call.name) for call in calls}),
        "a forward: depth": max(map(len, stacks)),
        "a forward: files": len({call.filename for call in calls}),
    }


def count_nodes(nodes: list[ast.AST]) -> int:
    """Nodes without contexts, and without docstrings and their expressions."""
    counted = sum(not isinstance(node, ast.expr_context) for node in nodes)
    docstrings = [
        ast.get_docstring(node)
        for node in nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    return counted - 2 * (len(docstrings) - docstrings.count(None))


def is_text(node: ast.AST) -> bool:
    """Whether it is a string that stands alone: a docstring, or what documents a
    field."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def lines_of_code(source: str) -> list[str]:
    """The stripped lines, without empty lines, comments and strings that stand
    alone."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and is_text(node):
            texts.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [
        line.strip()
        for number, line in enumerate(source.splitlines(), 1)
        if number not in texts
    ]
    return [line for line in lines if line and not line.startswith("#")]


def bound_names(nodes: list[ast.AST]) -> Iterator[str]:
    """Every name that an assignment, loop or comprehension binds, and every
    parameter."""
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def is_packed(assignment: ast.Assign) -> bool:
    """Whether it binds several names to as many expressions: `a, b = x, y`."""
    return isinstance(assignment.value, ast.Tuple) and isinstance(
        assignment.targets[0], ast.Tuple
    )


def is_private(node: ast.AST) -> bool:
    """Whether it is a private attribute of another object or module. `os._exit` is a
    public one."""
    if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
        return False
    if node.attr.startswith("__"):
        return False
    return ast.unparse(node.value) not in ("self", "cls", "os")


def asks_for_kind(node: ast.AST) -> bool:
    """Whether it tells operators apart, by class or by member of the enumeration. A look-up
    in the table of operators does not count."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
        return ast.unparse(node.args[1]).endswith("Spec")
    if isinstance(node, ast.Compare):
        return any(
            OPERATOR_KINDS in ast.unparse(compared) for compared in node.comparators
        )
    return False


if __name__ == "__main__":
    main()
