"""Strict command line and YAML for plain dataclasses.

    argv -> {field: value} of [recipe.yaml] and of flags -> dataclasses

Each field is a flag of the same name; its docstring is its help. The first argument may
be a YAML file with the same names as keys; flags win over it. Nothing unknown passes:
an unknown key or flag, a value of another type, a key twice in a file are all
`UserError`, with the nearest known name.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import (
    Any,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from mora_ds.adapters.registry import ADAPTERS, Control
from mora_ds.common.errors import (
    MOST_PROBLEMS,
    UserError,
    nearest,
    raise_validation_errors,
    unusable_words,
)
from mora_ds.common.files import load_yaml, packaged
from mora_ds.common.untrusted import typed
from mora_ds.runtime.cli import StrictParser

Class = TypeVar("Class", bound=type)

Settings: TypeAlias = dict[str, Any]
"""Field of the settings of a run -> its value."""

_NOT_GIVEN = object()

_LOCAL_RANK = re.compile(r"--local[_-]rank=-?\d+")
"""What launchers add to a command line. The variable LOCAL_RANK, which they set too, is
what is read."""

_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)


def documented(cls: Class) -> Class:
    """Class decorator, under `@dataclass`: every field's docstring becomes its help.

    One text serves the reader of the source and the reader of `--help`. A field without
    one is a TypeError.
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


def parse_flat(
    groups: Sequence[type], blocks: Mapping[str, type], argv: Sequence[str]
) -> tuple[Settings, Settings]:
    """({field: value} of the recipe, the same of the flags), of fields of the
    dataclasses `groups`; what is not given is absent. `blocks`: key of a recipe -> the
    dataclass whose fields it holds, {field: value} too. Raises `UserError`; `-h` prints
    help and raises SystemExit(0)."""
    raise_validation_errors(unusable_words(argv))
    arguments = [word for word in argv if not _LOCAL_RANK.fullmatch(word)]
    hints = {
        name: hint for group in groups for name, hint in get_type_hints(group).items()
    }
    of_recipe = {}
    if arguments and not arguments[0].startswith("-"):
        of_recipe = read_recipe(packaged(arguments.pop(0)), {**hints, **blocks})
    parsed, unknown = _parser(groups, hints).parse_known_args(
        arguments, argparse.Namespace(**dict.fromkeys(hints, _NOT_GIVEN))
    )
    if unknown:
        known = [f"--{name}" for name in hints]
        flags = [word.split("=")[0] for word in unknown if word.startswith("--")]
        raise_validation_errors(
            f"unknown flag {flag}.{nearest(flag, known)}" for flag in flags
        )
        raise UserError(
            f"unexpected argument {unknown[0]!r}: a YAML recipe comes first, and every value follows its flag"
        )
    settings = vars(parsed).items()
    return of_recipe, {
        name: value for name, value in settings if value is not _NOT_GIVEN
    }


def _parser(groups: Iterable[type], hints: Mapping[str, Any]) -> StrictParser:
    """The parser of the flags of all `groups`, whose fields have the types `hints`."""
    parser = StrictParser(
        description="Continual pretraining with MoRA under DeepSpeed. "
        f"Values of --adapter: {', '.join((*ADAPTERS, *Control))}.",
        allow_abbrev=False,
        usage="%(prog)s [recipe.yaml] [--flag value ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # Argparse takes -1e-3 for a flag
    parser._negative_number_matcher = _NEGATIVE
    for group in groups:
        for field in dataclasses.fields(group):
            _add_flag(parser, field, hints[field.name])
    return parser


def _add_flag(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any
) -> None:
    """Add the flag of a field. A yes/no field takes a value or none; where it is on by
    default, there is --no_FIELD too."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    # `int | None` and `list[int]` take an int
    kind, *_ = get_args(hint) or (hint,)
    options: dict[str, Any] = {"type": kind}
    if hint is bool:
        options = {"type": _yes_or_no, "nargs": "?", "const": True}
    elif get_origin(hint) is list:
        options["nargs"] = "+"
    text = field.metadata["help"]
    parser.add_argument(*_spellings(field.name), default=default, help=text, **options)
    if default is True:
        parser.add_argument(
            *_spellings(f"no_{field.name}"),
            action="store_false",
            dest=field.name,
            default=False,
            help=text,
        )


def _spellings(name: str) -> list[str]:
    """--max_steps and --max-steps."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _yes_or_no(text: str) -> bool:
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(
        f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
    )


def read_recipe(path: str, hints: Mapping[str, Any]) -> Settings:
    """The settings of a YAML recipe, as the types in `hints`. One `UserError` lists all
    that are wrong."""
    settings = load_yaml(path, "the recipe")
    for key in RECORDED_KEYS:
        settings.pop(key, None)
    return typed_values(settings, hints, path)


def typed_values(
    content: Any, hints: Mapping[str, Any], path: str, prefix: str = ""
) -> Settings:
    """The values of a mapping in the YAML file `path` as the types in `hints`; of a
    dataclass those that are given.

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
        if key not in hints:
            suggestion = nearest(str(key), hints)
            problems.append(f"{path}: unknown key '{prefix}{key}'.{suggestion}")
            if len(problems) == MOST_PROBLEMS:
                break
            continue
        hint = hints[key]
        try:
            if dataclasses.is_dataclass(hint):
                fields = get_type_hints(hint)
                values[key] = typed_values(value, fields, path, f"{prefix}{key}.")
            else:
                values[key] = typed(hint, _as_written(value, hint), where)
        except UserError as error:
            problems.append(str(error))
        if value == "":
            problems.append(f"{where} must not be empty")
    raise_validation_errors(problems)
    return values


def _as_written(value: Any, hint: Any) -> Any:
    """What the user means by `value`: one entry stands for a list of it, and YAML reads
    4e-4, which has no point, as text."""
    if get_origin(hint) is list and not isinstance(value, list):
        return [value]
    is_bool = isinstance(value, bool)
    if (
        float in (hint, *get_args(hint))
        and isinstance(value, (int, str))
        and not is_bool
    ):
        with suppress(ValueError):
            return float(value)
    return value
