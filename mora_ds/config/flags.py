"""Strict command line and YAML for plain dataclasses.

    argv -> {field: value} of [recipe.yaml] and of flags -> dataclasses

Each field is a flag of the same name; its docstring is its help. The first argument may be
a YAML file with the same names as keys; flags win over it. Nothing unknown passes: an
unknown key or flag, a value of another type, a key twice in a file are all `UserError`,
with the nearest known name.
"""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from mora_ds.common import research
from mora_ds.common.errors import UserError, empty_words, nearest, refuse
from mora_ds.common.files import load_yaml, shipped
from mora_ds.common.untrusted import typed

Class = TypeVar("Class", bound=type)

_NOT_GIVEN = object()


def documented(cls: Class) -> Class:
    """Class decorator, under `@dataclass`: every field's docstring becomes its help.

    One text serves the reader of the source and the reader of `--help`. A field without one
    is a TypeError.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for statement, after in pairwise([*tree.body, ast.Pass()]):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = ast.unparse(statement.target)
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
            raise TypeError(f"{cls.__name__}.{name} has no docstring under it")
        text = inspect.cleandoc(str(after.value.value)).replace("\n", " ")
        default = cls.__dict__[name]
        if not isinstance(default, dataclasses.Field):
            default = dataclasses.field(default=default)
        default.metadata = types.MappingProxyType({"help": text.replace("%", "%%")})
        setattr(cls, name, default)
    return cls


RECORDED_KEYS = ("versions", "resolved")
"""Keys of `run.yaml` that record facts about the run; in a recipe they are not read."""

RESEARCH = "research"
"""The key of a recipe that holds the settings of `mora_ds.research`."""


class StrictParser(HfArgumentParser):
    """HfArgumentParser that raises `UserError` where it would end the process, but for `-h`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_flat(
    groups: Sequence[type], argv: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """({field: value} of the recipe, the same of the flags), of fields of the dataclasses
    `groups`; what is not given is absent. Raises `UserError`; `-h` prints help and raises
    SystemExit(0)."""
    refuse(empty_words(argv))
    arguments = list(argv)
    recipe = _pop_recipe(arguments)
    of_recipe = read_recipe(shipped(recipe), groups) if recipe else {}
    parser = StrictParser(
        cast(Any, groups),
        description="Continual pretraining with MoRA under DeepSpeed.",
        allow_abbrev=False,
        usage="%(prog)s [recipe.yaml] [--flag value ...]",
    )
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    parsed, unknown = parser.parse_known_args(
        arguments, argparse.Namespace(**dict.fromkeys(names, _NOT_GIVEN))
    )
    if unknown:
        refuse(_unknown_flag(word, names) for word in unknown if word.startswith("--"))
        raise UserError(
            f"unexpected argument {unknown[0]!r}: a YAML recipe comes first, and every value follows its flag"
        )
    settings = vars(parsed).items()
    return of_recipe, {name: value for name, value in settings if value is not _NOT_GIVEN}


def _pop_recipe(arguments: list[str]) -> str | None:
    """Take the recipe out of `arguments`, where a launcher may have put --local_rank first."""
    position = 0
    if arguments and arguments[0].replace("-", "_").startswith("__local_rank"):
        position = 1 if "=" in arguments[0] else 2
    if position < len(arguments) and not arguments[position].startswith("-"):
        return arguments.pop(position)
    return None


def _unknown_flag(word: str, known: Iterable[str]) -> str:
    """The message for a flag that is none of the `known` settings."""
    flag = word.split("=")[0]
    return f"unknown flag {flag}.{nearest(flag, [f'--{setting}' for setting in known])}"


def read_recipe(path: str, groups: Iterable[type]) -> dict[str, Any]:
    """The settings of a YAML recipe, checked against the fields of `groups`. One
    `UserError` lists all that are wrong."""
    settings = load_yaml(path, "the recipe")
    for key in RECORDED_KEYS:
        settings.pop(key, None)
    has_research = RESEARCH in settings
    block = settings.pop(RESEARCH, None)
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    values = typed_values(settings, hints, path)
    if has_research:
        values[RESEARCH] = research.load("settings").read(block, path)
    return values


def typed_values(
    content: Any, hints: Mapping[str, Any], path: str, prefix: str = ""
) -> dict[str, Any]:
    """The values of a mapping in the YAML file `path` as the types in `hints`.

    `prefix`: where the mapping stands in the file, such as "sources.web.". Raises one
    `UserError` for all unknown keys and wrong types.
    """
    if not isinstance(content, dict):
        name = prefix.rstrip(".")
        raise UserError(f"{path}: {name} must be `key: value` lines, got {content!r}")
    values = {}
    problems = []
    for key, value in content.items():
        where = f"{path}: {prefix}{key}"
        if key in hints:
            try:
                values[key] = typed(hints[key], _as_written(value, hints[key]), where)
            except UserError as error:
                problems.append(str(error))
            if value == "":
                problems.append(f"{where} must not be empty")
        else:
            suggestion = nearest(str(key), hints)
            problems.append(f"{path}: unknown key '{prefix}{key}'.{suggestion}")
    refuse(problems)
    return values


def _as_written(value: Any, hint: Any) -> Any:
    """What the user means by `value`: one entry stands for a list of it, and YAML reads
    4e-4, which has no point, as text."""
    if get_origin(hint) is list and not isinstance(value, list):
        return [value]
    is_bool = isinstance(value, bool)
    if float in (hint, *get_args(hint)) and isinstance(value, (int, str)) and not is_bool:
        with suppress(ValueError):
            return float(value)
    return value
