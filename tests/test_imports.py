"""Who may import whom. One table, read against the imports of every module, those inside
functions included.

A package may import the packages that the table names for it, its own modules, and
`COMMON`; nothing else of mora_ds.
"""

import ast
import os
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

import mora_ds
from tests.helpers.tools import called

ROOT = Path(__file__).resolve().parents[1]

COMMON = "common"
"""The package that every other may import."""

TABLE = """
common:
adapters:
data:
runtime:
parallel: adapters models
models: adapters data runtime
engine: adapters models parallel runtime
remora: adapters models engine runtime
planning: adapters data models parallel engine
checkpoint: adapters models runtime engine remora
config: adapters parallel runtime engine
deploy: adapters models remora checkpoint
eval: data models checkpoint deploy
research: adapters checkpoint config models planning runtime
train: adapters data runtime parallel models engine remora planning checkpoint config deploy research
# A command stands above all that it calls: it reads flags, calls functions and prints what they return.
commands: adapters data runtime models engine planning checkpoint config deploy eval research train
__main__: commands
hf: adapters checkpoint config engine models remora runtime train
peft: adapters
"""
MAY_IMPORT = {
    package: set((allowed or "").split())
    for package, allowed in yaml.safe_load(TABLE).items()
}
ROOT_ENTRIES = 21
"""The most entries that `mora_ds/` may have."""

DEEPSPEED = {"engine", "parallel"}
"""The packages whose modules may import deepspeed."""

COSTLY = ("mora_ds.engine", "mora_ds.parallel", "mora_ds.runtime")
"""Packages whose `__init__` imports none of their modules, which take seconds to import."""

LIBRARIES_OF_OPS = {"torch", "numpy", "safetensors"}
"""All that the tensor functions in adapters/ops need; numpy draws the permutations."""

WITHOUT_DEEPSPEED = ("adapters", "data", "deploy", "eval")
"""Packages that must not need DeepSpeed at all, not even through another package: they
serve outside of training.
"""


def name_of(path):
    """The dotted name of a module: mora_ds/data/cache.py -> mora_ds.data.cache."""
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {name_of(path): path for path in sorted((ROOT / "mora_ds").rglob("*.py"))}


def imports(tree):
    """Absolute names of all that is imported while the program runs, at the top or inside a
    function.
    """
    names = set()
    for node in _running(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module, "a relative import hides which package it reaches"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _running(node):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _running(child)


IMPORTS = {name: imports(ast.parse(path.read_text())) for name, path in MODULES.items()}


def package_of(module):
    """mora_ds.data.cache -> data; "" for mora_ds itself."""
    return module.split(".")[1] if "." in module else ""


def modules_imported(module):
    """The modules of mora_ds that one imports, by their longest name: `from mora_ds.engine
    import zero` is mora_ds.engine.zero."""
    modules = set()
    for name in IMPORTS[module]:
        if name.split(".")[0] == "mora_ds":
            while name not in MODULES:
                name = name.rpartition(".")[0]
            modules.add(name)
    return modules - {module}


def libraries(module):
    return (
        {imported.split(".")[0] for imported in IMPORTS[module]}
        - {"mora_ds"}
        - set(sys.stdlib_module_names)
    )


def forbidden(package, imported):
    """The `imported` modules that the table does not grant to a module of `package`."""
    granted = MAY_IMPORT[package] | {COMMON, package}
    return {module for module in imported if package_of(module) not in granted}


def reachable(module):
    """The modules that importing one brings along, itself included."""
    reached = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += modules_imported(name)
    return reached


def test_an_import_inside_a_function_is_seen():
    inside = ast.parse("def f():\n    import mora_ds.train")
    assert imports(inside) == {"mora_ds.train"}


def test_every_package_is_in_the_table():
    assert {package_of(name) for name in MODULES} == {"", *MAY_IMPORT}
    entries = {path.name for path in (ROOT / "mora_ds").iterdir()}
    assert len(entries - {"__pycache__"}) <= ROOT_ENTRIES


@pytest.mark.parametrize(
    "module", [name for name in MODULES if package_of(name) in MAY_IMPORT]
)
def test_a_module_imports_what_its_package_may(module):
    assert not forbidden(package_of(module), modules_imported(module))


def test_the_table_has_no_cycle_and_grants_nothing_that_is_not_used():
    used = {
        (package_of(module), package_of(imported))
        for module in MODULES
        for imported in modules_imported(module)
    }
    granted = {
        (package, allowed) for package in MAY_IMPORT for allowed in MAY_IMPORT[package]
    }
    assert granted - used == set(), "no longer imported"
    assert granted & {pair[::-1] for pair in granted} == set(), "they import each other"


def test_no_two_modules_import_each_other():
    for module in MODULES:
        for imported in modules_imported(module):
            assert module not in reachable(imported), (
                f"{module} and {imported} import each other"
            )


def test_packages_hand_on_from_their_own_modules_only():
    """An `__init__` that imported another package would make every import of the package
    pay for it.
    """
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "mora_ds":
            imported = {
                module
                for module in modules_imported(name)
                if package_of(module) != COMMON
            }
            assert all(module.startswith(f"{name}.") for module in imported), name
            assert name not in COSTLY or not (imported or libraries(name)), name


def test_deepspeed_is_imported_by_two_packages():
    packages = {package_of(name) for name in MODULES if "deepspeed" in libraries(name)}
    assert packages == DEEPSPEED


@pytest.mark.parametrize("package", WITHOUT_DEEPSPEED)
def test_deepspeed_is_needed_by_few(package):
    for module in MODULES:
        if package_of(module) == package:
            needs = {
                name for name in reachable(module) if "deepspeed" in libraries(name)
            }
            assert not needs, f"{module} needs DeepSpeed through {needs}"


def test_the_operators_need_torch_alone():
    for name in MODULES:
        if name.startswith("mora_ds.adapters.ops."):
            assert libraries(name) <= LIBRARIES_OF_OPS, name


def test_triton_is_imported_by_one_module_and_only_layers_use_its_kernels():
    """The kernels round otherwise than merges, merge ledgers and exports, which must have
    the same bits everywhere.
    """
    assert {name for name in MODULES if "triton" in libraries(name)} == {
        "mora_ds.adapters.kernels.triton_ops"
    }
    users = {
        name
        for name in MODULES
        if any(".kernels" in module for module in modules_imported(name))
    }
    assert {name for name in users if ".kernels" not in name} == {
        "mora_ds.adapters.layer"
    }
    for name in ("mora", "int8", "updates"):
        modules = reachable(f"mora_ds.adapters.ops.{name}")
        assert not [module for module in modules if ".kernels" in module]


def test_research_is_imported_where_it_is_asked_for():
    """By a command of its own, or for the block `research:` of a recipe: inside a function."""
    for name, path in MODULES.items():
        statements = ast.parse(path.read_text()).body
        at_the_top = {
            node.module for node in statements if isinstance(node, ast.ImportFrom)
        }
        named = [module for module in at_the_top if package_of(module) == "research"]
        assert package_of(name) == "research" or not named, name


def test_entry_points_do_not_reach_around_mora_ds():
    entries = [*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").rglob("*.py")]
    assert entries
    for name in MODULES:
        packages = {imported.split(".")[0] for imported in IMPORTS[name]}
        assert packages.isdisjoint(("launch", "tools", "tests")), name
    for entry in entries:
        names = imports(ast.parse(entry.read_text()))
        assert "deepspeed" not in {name.split(".")[0] for name in names}, entry


def test_tests_share_code_through_helpers_only():
    """A test file that another one imports cannot be split, renamed or dropped without
    breaking the other.
    """
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imports(ast.parse(path.read_text())):
            assert not (name.startswith("tests.") and ".test_" in name), path


def test_the_public_names_are_there():
    assert len(set(mora_ds.__all__)) == len(mora_ds.__all__) > 5
    for name in mora_ds.__all__:
        assert getattr(mora_ds, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mora_ds.nothing  # noqa: B018


def python(source):
    """The lines that a program prints, in an environment without ranks."""
    words = [sys.executable, "-c", dedent(source)]
    environment = {name: text for name, text in os.environ.items() if name != "RANK"}
    done = called(words, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_settings_flags_and_first_words_need_neither_torch_nor_transformers():
    """`--help`, a wrong flag and shells wait for nothing; a plan says what it waits for."""
    source = """
        import contextlib, io, pkgutil, sys
        from importlib import import_module
        import mora_ds.config
        from mora_ds.commands import dispatch, plan, pretrain

        def answer(name, *flags):
            sys.argv = [name, *flags]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    dispatch.run(name)
                except (SystemExit, ValueError) as left:
                    return str(left)

        def ends():
            raise SystemExit("said first")

        for module in pkgutil.iter_modules(mora_ds.config.__path__):
            import_module(f"mora_ds.config.{module.name}")
        for name in dispatch.COMMANDS:
            assert answer(name, "--help") == "0"
            assert answer(name, "--lr", "1") != "0"
        plan.say_loading = pretrain.say_loading = ends
        print(answer("plan", "--model", "m", "--gpus", "8"), answer("pretrain", "--dry_run"))
        print(answer("pretrain", "--lr", "1"))
        print({"torch", "transformers", "deepspeed"} & {*sys.modules})
    """
    assert python(source) == [
        "said first said first",
        "unknown flag --lr. Did you mean '--learning_rate'?",
        "set()",
    ]


def test_ranks_meet_before_anything_slow_is_imported():
    """Ranks whose settings differ fail within seconds of their start
    (`commands/pretrain.py`), and no engine loads torch's compiler."""
    source = """
        import sys
        import mora_ds.config.validate, mora_ds.train.setup
        from mora_ds.engine.muon import load_kernels
        load_kernels()
        import mora_ds.train.setup
        slow = {"datasets", "transformers.modeling_utils", "transformers.integrations.moe"}
        print((slow | {"torch.distributed.tensor", "torch._inductor.compile_fx"}) & {*sys.modules})
    """
    assert python(source)[-1] == "set()"
