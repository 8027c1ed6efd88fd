"""How large the code is and how easy to read, counted from its syntax trees: names and
line breaks cost nothing there.

    python tools/measures.py            mora_ds, tools and tests, as one table

Nodes leave out docstrings and the contexts Load, Store and Del. A line of code is one
that is neither empty nor only a comment or a docstring.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
    measured["mora_ds"]["flags of training"] = count_flags(ROOT / "mora_ds" / "config")
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
    comments = sum(count_comment_lines(source) for source in sources)
    kinds = sum(asks_for_kind(node) for node in nodes)
    vague = [name for name in bound_names(nodes) if name.lstrip("_") in VAGUE_NAMES]
    assignments = [node for node in nodes if isinstance(node, ast.Assign)]
    packed = sum(is_packed(assignment) for assignment in assignments)
    thousand_lines = len(lines) / 1000
    return {
        "nodes of the syntax tree": count_nodes(nodes),
        "lines of code": len(lines),
        "functions": sum(isinstance(node, ast.FunctionDef) for node in nodes),
        "places that ask for an operator's kind": kinds,
        "names that say nothing, in 1,000 lines": round(len(vague) / thousand_lines, 1),
        "assignments of several packed values, %": round(
            100 * packed / len(assignments), 1
        ),
        "characters a line, without indentation": round(fmean(map(len, lines)), 1),
        "comment lines in 1,000 lines": round(comments / thousand_lines, 1),
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


def count_nodes(nodes: list[ast.AST]) -> int:
    """Nodes without contexts, and without docstrings and their expressions."""
    counted = sum(not isinstance(node, ast.expr_context) for node in nodes)
    return counted - 2 * sum(docstring(node) is not None for node in nodes)


def docstring(node: ast.AST) -> ast.stmt | None:
    """The statement that documents a module, class or function."""
    if (
        not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        or not node.body
    ):
        return None
    return node.body[0] if is_text(node.body[0]) else None


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


def count_comment_lines(source: str) -> int:
    """Lines that hold only a comment. Marks that other tools read do not count."""
    comment = re.compile(r"^\s*#(?!!| fmt:)", re.MULTILINE)
    return len(comment.findall(source))


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
