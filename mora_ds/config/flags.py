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
    NoReturn,
    TypeAlias,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from transformers import HfArgumentParser

from mora_ds.adapters.registry import ADAPTERS, Control
from mora_ds.common import research
from mora_ds.common.errors import UserError, nearest, refuse, unusable_words
from mora_ds.common.files import load_yaml, shipped
from mora_ds.common.untrusted import typed

Class = TypeVar("Class", bound=type)

Settings: TypeAlias = dict[str, Any]
"""Field of the settings of a run -> its value."""

_NOT_GIVEN = object()

_LOCAL_RANK = re.compile(r"--local[_-]rank=-?\d+")
"""What launchers add to a command line. The variable LOCAL_RANK, which they set too, is
what is read."""


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

RESEARCH = "research"
"""The key of a recipe that holds the settings of `mora_ds.research`."""

_REMOVED = """
alignment_rank, alignment_weight: was removed, since the alignment loss did not help: leave it out
attention: was removed: attention stays inside documents wherever the model can, or take --attn_implementation sdpa
base_buffers: was removed: two decoder layers are on the device at a time
base_cache_dir: was removed: set HF_HOME to a folder on the node's own disk, or copy the model there first
compile: was removed: on GPUs the operators have kernels of their own
domain_adapters, targets: moved to the block `research:` of a recipe
eval_domains: was removed: an evaluation set with a domain's name is read as that domain's
eval_tasks_limit: was removed: a FILE.yaml of --eval_tasks may name a smaller split
exclude_eval_documents: was removed: --held_out_share keeps documents apart, datatrove removes others
expert_rank: was removed: --mora_rank is divided by the number of experts that compute a token
freeze: was removed: a run with domains trains all of its MoRA matrices
full_rank_learning_rate, full_rank_steps: was removed: run --adapter full first, then adapt its merged model
gradient_checkpointing_reentrant: was removed: --gradient_checkpointing uses PyTorch's other kind
heartbeat_timeout_s: was removed: schedulers watch processes, --collective_timeout_s ends a rank that waits in vain
hold_weights: was removed: --compute chooses between activation and weight
init_adapter: was removed: a LoRA of PEFT is merged into its base with PEFT, and that model adapted
liger: was removed, since nobody has measured it here
local_rank: was removed: the variable LOCAL_RANK, which launchers set, is read
lora_rank: was removed: --mora_rank is the rank of --adapter lora too
merge_at_end: was removed: exports add the MoRA matrices that are not merged yet
merge_at_latest, merge_when, stall_signal, stall_tolerance, stall_window: was removed: merge at intervals, --merge_every
merge_precision: was removed: every merge is summed in fp32 and rounded once
muon_learning_rate: was removed: --learning_rate is the adapter's, --embedding_learning_rate that of all else
muon_momentum: was removed: it is 0.95
node_base: was removed: processes of a node share the base where they can see each other's memory
peer_silence_s: was removed: --collective_timeout_s ends a rank that waits for one that is gone
project: was removed: set WANDB_PROJECT
run_name: was removed: the run is named after --output_dir, in W&B after WANDB_NAME
run_tags: was removed: set WANDB_TAGS
optimizer_reset: was removed, since no run gained by keeping it: a merge zeroes moments and step count
stream_retry_s: was removed: `datasets` repeats reads that fail, and a run that ends is resumed
subspace_cycles: was removed with --operator subspace: take rotate
tp_inputs: was removed: every rank saves a block's complete input, which --gradient_checkpointing avoids
tp_grouping, tp_segments: was removed: MoRA matrices are gathered where they are used
train_embedding_rows: was removed: --train_embedding_rank learns more with fewer parameters
train_tokenizer_type: was removed: the tokenizer is trained as BPE
trainable_budget: was removed: mora-ds analyze --trainable_budget writes a plan of targets
warmup_ratio: was removed: --warmup_steps below 1 is a share of the run
"""
"""Settings of versions before 0.3.0, and what to do instead, to be read after a
name."""

REMOVED = {
    name: instead
    for names, instead in (
        line.split(": ", 1) for line in _REMOVED.strip().splitlines()
    )
    for name in names.split(", ")
}


class StrictParser(HfArgumentParser):
    """HfArgumentParser that raises `UserError` where it would end the process, but for
    `-h`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_flat(
    groups: Sequence[type], argv: Sequence[str]
) -> tuple[Settings, Settings]:
    """({field: value} of the recipe, the same of the flags), of fields of the
    dataclasses `groups`; what is not given is absent. Raises `UserError`; `-h` prints
    help and raises SystemExit(0)."""
    refuse(unusable_words(argv))
    arguments = [word for word in argv if not _LOCAL_RANK.fullmatch(word)]
    of_recipe = {}
    if arguments and not arguments[0].startswith("-"):
        of_recipe = read_recipe(shipped(arguments.pop(0)), groups)
    parser = StrictParser(
        cast(Any, groups),
        description="Continual pretraining with MoRA under DeepSpeed. "
        f"Values of --adapter: {', '.join((*ADAPTERS, *Control))}.",
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
    return of_recipe, {
        name: value for name, value in settings if value is not _NOT_GIVEN
    }


def _unknown_flag(word: str, known: Iterable[str]) -> str:
    """The message for a flag that is none of the `known` settings."""
    flag = word.split("=")[0]
    name = flag.removeprefix("--").removeprefix("no_")
    if name in REMOVED:
        return f"{flag} {REMOVED[name]}"
    return f"unknown flag {flag}.{nearest(flag, [f'--{setting}' for setting in known])}"


def read_recipe(path: str, groups: Iterable[type]) -> Settings:
    """The settings of a YAML recipe, checked against the fields of `groups`. One
    `UserError` lists all that are wrong."""
    settings = load_yaml(path, "the recipe")
    for key in RECORDED_KEYS:
        settings.pop(key, None)
    has_research = RESEARCH in settings
    block = settings.pop(RESEARCH, None)
    hints = {
        name: hint for group in groups for name, hint in get_type_hints(group).items()
    }
    values = typed_values(settings, hints, path)
    if has_research:
        values[RESEARCH] = research.load("settings").read(block, path)
    return values


def typed_values(
    content: Any, hints: Mapping[str, Any], path: str, prefix: str = ""
) -> Settings:
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
        elif key in REMOVED and prefix in ("", f"{RESEARCH}."):
            problems.append(f"{where} {REMOVED[key]}")
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
    if (
        float in (hint, *get_args(hint))
        and isinstance(value, (int, str))
        and not is_bool
    ):
        with suppress(ValueError):
            return float(value)
    return value
