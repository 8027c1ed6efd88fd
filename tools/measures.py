"""How large the code is and how easy to read, counted from its syntax trees: names and line
breaks cost nothing there.

    python tools/measures.py                                        mora_ds, tools and tests, as one table
    python tools/measures.py --root ANOTHER_CHECKOUT

Nodes leave out docstrings and the contexts Load, Store and Del. A line of code is one that
is neither empty nor only a comment or a docstring.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mora_ds.runtime.cli import table

PACKAGES = ("mora_ds", "tools", "tests")
VAGUE_NAMES = frozenset(
    (
        "deal", "each", "found", "given", "held", "kept", "made", "meet", "met", "other", "others", "own", "part",
        "parts", "place", "places", "rest", "thing", "things",
    )
)  # fmt: skip
"""Names that do not say what of the field they stand for."""
OPERATOR_KINDS = "OperatorKind"
"""The enumeration whose members tell one operator from another, as the classes whose names
end in Spec do.
"""
Function = ast.FunctionDef | ast.AsyncFunctionDef
Measures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).parents[1],
        help="the checkout to measure",
    )
    root = parser.parse_args().root
    measured = {package: measure(root / package) for package in PACKAGES}
    measured["mora_ds"]["flags of training"] = count_flags(root / "mora_ds" / "config")
    print("\n".join(table(as_table(measured))))


def as_table(measured: dict[str, Measures]) -> list[list[str]]:
    """One row a measure, one column a package."""
    names = dict.fromkeys(name for measures in measured.values() for name in measures)
    rows = [["", *measured]]
    for name in names:
        values = [measures.get(name) for measures in measured.values()]
        rows.append([name, *("" if value is None else f"{value:,}" for value in values)])
    return rows


def measure(folder: Path) -> Measures:
    """{name of a measure: its value} over all modules under `folder`."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    code_lines = [line for source in sources for line in lines_of_code(source)]
    comments = sum(count_comment_lines(source) for source in sources)
    functions = [node for node in nodes if isinstance(node, Function)]
    assignments = [node for node in nodes if isinstance(node, ast.Assign)]
    packed = [assignment for assignment in assignments if is_packed(assignment)]
    vague = [name for name in bound_names(nodes) if name.lstrip("_") in VAGUE_NAMES]
    thousand_lines = max(len(code_lines), 1) / 1000
    return {
        "nodes of the syntax tree": count_nodes(nodes),
        "lines of code": len(code_lines),
        "functions": len(functions),
        "places that ask for an operator's kind": sum(
            asks_for_kind(node) for node in nodes
        ),
        "names that say nothing, in 1,000 lines": round(len(vague) / thousand_lines, 1),
        "assignments of several packed values, %": round(
            100 * len(packed) / max(len(assignments), 1), 1
        ),
        "characters a line, without indentation": round(
            sum(map(len, code_lines)) / max(len(code_lines), 1), 1
        ),
        "comment lines in 1,000 lines": round(comments / thousand_lines, 1),
    }


def count_flags(config: Path) -> int:
    """Flags of training: the fields of the classes of settings, which the decorator
    `documented` marks.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in config.glob("*.py")]
    classes = [
        node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    settings = [
        node
        for node in classes
        if any(ast.unparse(mark) == "documented" for mark in node.decorator_list)
    ]
    return sum(
        isinstance(statement, ast.AnnAssign) for node in settings for statement in node.body
    )


def count_nodes(nodes: list[ast.AST]) -> int:
    """Nodes without contexts and without docstrings, each of which is two: an expression
    and its constant.
    """
    counted = sum(not isinstance(node, ast.expr_context) for node in nodes)
    return counted - 2 * sum(docstring(node) is not None for node in nodes)


def docstring(node: ast.AST) -> ast.expr | None:
    """The constant that documents a module, class or function."""
    if not isinstance(node, ast.Module | ast.ClassDef | Function) or not node.body:
        return None
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        return first.value
    return None


def lines_of_code(source: str) -> list[str]:
    """The lines without indentation; not empty ones, comments, docstrings, nor the strings
    under fields.
    """
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            texts.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [
        line.strip()
        for number, line in enumerate(source.splitlines(), 1)
        if number not in texts
    ]
    return [line for line in lines if line and not line.startswith("#")]


def count_comment_lines(source: str) -> int:
    """Lines that are a comment and nothing else; not the marks that other tools read."""
    comments = [
        line.strip() for line in source.splitlines() if line.strip().startswith("#")
    ]
    return sum(not comment.startswith(("# fmt:", "#!")) for comment in comments)


def bound_names(nodes: list[ast.AST]) -> Iterator[str]:
    """Every name that an assignment, loop or comprehension binds, and every parameter."""
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
    """Whether it tells operators apart, by class or by member of the enumeration. To read
    what the table of operators says of a kind is no such place."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
        return ast.unparse(node.args[1]).endswith("Spec")
    if isinstance(node, ast.Compare):
        return any(OPERATOR_KINDS in ast.unparse(compared) for compared in node.comparators)
    return False


if __name__ == "__main__":
    main()
