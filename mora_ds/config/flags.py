"""Strict command line and YAML for plain dataclasses.

    argv -> [recipe.yaml] + flags -> one flat {field: value} -> dataclasses

Each field is a flag of the same name; its docstring is its help. The first argument may be a YAML file with the same
names as keys; flags win over it. Nothing unknown passes: an unknown key or flag, a value of another type, a key twice
in a file are all `UserError`, with the nearest known name.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import logging
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from mora_ds.common.errors import UserError, nearest, refuse
from mora_ds.common.files import load_yaml, shipped
from mora_ds.runtime.log_setup import rank

logger = logging.getLogger(__name__)

Class = TypeVar("Class", bound=type)

_NOT_GIVEN = object()


def documented(cls: Class) -> Class:
    """Class decorator, under `@dataclass`: every field's docstring becomes its `metadata["help"]`.

    One text serves the reader of the source and the reader of `--help`. A field without one is a TypeError.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for statement, after in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name = statement.target.id
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
            raise TypeError(f"{cls.__name__}.{name} has no docstring under it")
        text = inspect.cleandoc(str(after.value.value)).replace("\n", " ")
        metadata = {"help": text.replace("%", "%%")}
        default = cls.__dict__[name]
        if isinstance(default, dataclasses.Field):
            default.metadata = types.MappingProxyType(metadata)
        else:
            setattr(cls, name, dataclasses.field(default=default, metadata=metadata))
    return cls


@dataclasses.dataclass(frozen=True)
class Retired:
    """A setting that no longer exists. Recipes and run.yaml files of earlier versions may still name it."""

    value: Any
    """The one value that is still accepted, without effect: it asks for what every run does now."""
    advice: str
    """What was removed, and what to do about it."""

    def parse(self, text: str) -> Any:
        return string_to_bool(text) if isinstance(self.value, bool) else text


RENAMED = {"peer_silence_s": "heartbeat_timeout_s"}
"""Old name -> present name of a setting. The old one is accepted as a flag and as a key of a recipe."""

RETIRED = {
    "gradient_checkpointing_reentrant": Retired(
        False,
        "re-entrant checkpointing was removed, and --gradient_checkpointing uses PyTorch's other kind: leave out "
        "gradient_checkpointing_reentrant",
    ),
    "merge_precision": Retired(
        "exact",
        "incremental merges were removed, and every merge is exact (original weight + all MoRA matrices so far, summed "
        "in fp32, rounded once): leave out merge_precision; a run that began with incremental merges needs version 0.2",
    ),
}


BEFORE = {"attention": "dense"}
"""What a run did before a setting existed: it holds for a run.yaml that does not name the setting, so that the file
still repeats its run."""


class StrictParser(HfArgumentParser):
    """HfArgumentParser that raises `UserError` instead of ending the process. `-h` still prints help and ends it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_flat(
    groups: Iterable[type], argv: Sequence[str], description: str, ignored_keys: Iterable[str] = ()
) -> dict[str, Any]:
    """The values that `argv` sets, of all fields of the dataclasses `groups`; fields left at their defaults are absent.

    `ignored_keys` are top-level keys of a recipe that are no settings. Raises `UserError`; `-h` prints help and
    raises SystemExit(0).
    """
    groups = list(groups)
    arguments = list(argv)
    recipe = _pop_recipe(arguments)
    given = read_recipe(shipped(recipe), groups, ignored_keys) if recipe else {}
    parser = StrictParser(
        cast(Any, groups),
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [recipe.yaml] [--flag value ...]",
    )
    for name, retired in RETIRED.items():
        parser.add_argument(f"--{name}", type=retired.parse, nargs="?", const=True, help=argparse.SUPPRESS)
    names = [*RETIRED, *(field.name for group in groups for field in dataclasses.fields(group))]
    arguments = [_present_flag(word) for word in arguments]
    parsed, rest = parser.parse_known_args(arguments, argparse.Namespace(**dict.fromkeys(names, _NOT_GIVEN)))
    if rest:
        raise UserError(_unknown_flags(rest, parser))
    settings = {name: value for name, value in vars(parsed).items() if value is not _NOT_GIVEN}
    refuse(_retired(settings, "--"))
    return {**given, **{name: value for name, value in settings.items() if name not in RETIRED}}


def _pop_recipe(arguments: list[str]) -> str | None:
    """Takes the recipe out of `arguments`. The launcher puts its `--local_rank` before everything else."""
    position = 0
    if arguments and arguments[0].replace("-", "_").startswith("__local_rank"):
        position = 1 if "=" in arguments[0] else 2
    if position < len(arguments) and not arguments[position].startswith("-"):
        return arguments.pop(position)
    return None


def _present_flag(word: str) -> str:
    """`word` of a command line, with the present name where it is a renamed flag (`--flag` or `--flag=value`)."""
    flag, mark, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    if not flag.startswith("--") or name not in RENAMED:
        return word
    return f"--{_present_name(name)}{mark}{value}"


def _present_name(name: str) -> str:
    """The present name of a setting; rank 0 logs a warning where `name` is an old one."""
    if name in RENAMED and rank() == 0:
        logger.warning("--%s is called --%s now; the old name still works", name, RENAMED[name])
    return RENAMED.get(name, name)


def _retired(settings: Mapping[str, Any], where: str) -> Iterator[str]:
    """One message for each retired setting with another value than the one that is accepted."""
    for name, retired in RETIRED.items():
        if name in settings and settings[name] != retired.value:
            yield f"{where}{name}: {retired.advice}"


def _unknown_flags(unknown: list[str], parser: StrictParser) -> str:
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        return f"unexpected argument {unknown[0]!r}: a YAML recipe comes first, and every value follows its flag"
    return "\n".join(f"unknown flag {flag}.{nearest(flag, known)}" for flag in flags)


def read_recipe(path: str, groups: Iterable[type], ignored_keys: Iterable[str] = ()) -> dict[str, Any]:
    """The settings of a YAML recipe, checked against the fields of `groups`; one `UserError` lists all wrong ones."""
    content = load_yaml(path, "the recipe")
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    values: dict[str, Any] = {}
    problems = list(_retired(content, f"{path}: "))
    for key, value in content.items():
        if key in ignored_keys or key in RETIRED:
            continue
        if (name := _present_name(key)) in values:
            old = next(old for old, new in RENAMED.items() if new == name)
            problems.append(f"{path}: {old} and {name} are one setting: give one of them")
        values[name] = value
    if any(key in content for key in ignored_keys):  # a run has written it
        values = {**{name: value for name, value in BEFORE.items() if name in hints}, **values}
    try:
        settings = typed_values(values, hints, path)
    except UserError as error:
        problems += str(error).splitlines()
    refuse(problems)
    return settings


def typed_values(content: Any, hints: Mapping[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    """The values of a mapping in the YAML file `path` as the types in `hints`.

    `prefix`: where the mapping stands in the file, such as "sources.web.". Raises one `UserError` for all unknown keys
    and wrong types.
    """
    if not isinstance(content, dict):
        raise UserError(f"{path}: {prefix.rstrip('.')} must be {_NAMES[dict]}, got {content!r}")
    values, problems = {}, []
    for key, value in content.items():
        if key not in hints:
            problems.append(f"{path}: unknown key '{prefix}{key}'.{nearest(str(key), hints)}")
            continue
        try:
            values[key] = _coerce(value, hints[key])
        except ValueError as error:
            problems.append(f"{path}: {prefix}{key} {error}")
    refuse(problems)
    return values


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`. Raises ValueError that reads after the key's name."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        return [_coerce(part, item) for part in (value if isinstance(value, list) else [value])]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)  # YAML 1.1 reads 4e-4, without a point, as a string
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"must be {_NAMES[hint]}, got {value!r}")
    return value


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string (in quotes)",
    dict: "`key: value` lines",
}
