"""The house: imports run downward, libraries stay in their rooms, the README knows every option, starts are light."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

import bncli
from bncli import choices, cli
from bncli.cli.options import Grouped
from bncli.engine.declare import GROUPS, options_of
from bncli.engine.options import UNSET, ApplySpec, FitOptions, MergeSpec
from bncli.formats import FORMATS
from bncli.stats.conventions import PRESETS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bncli"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top down: a module imports only from rooms below its own, or from its own room
LEVELS = [
    ["__main__"],
    ["cli"],
    ["render"],
    ["exchange"],
    [""],  # the package itself: the public names, loaded on first use
    ["engine"],
    ["formats"],
    ["stats"],
    ["numerics", "system"],
]
ANYWHERE = {"choices", "errors", "version"}
HOMES = {
    "click": {"cli"},
    "rich": {"render", "cli"},
    "h5py": {"formats/hdf5", "stats/container", "exchange/keras"},
    "ctypes": {"numerics/compiled"},
    "google": {"exchange/onnx"},
    "safetensors": {"exchange/safetensors"},
    "distributed": {"engine/executors/dask"},
    "mpi4py": {"engine/executors/mpi"},
}


def name_of(path: Path) -> str:
    """bncli/formats/npy.py is formats.npy."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def level_of(module: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if room_of(module) in rooms)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path, *, at_top_only: bool = False) -> Iterator[tuple[str, str | None, int]]:
    """(module, name or None, line) of every import, but those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for child in block.body
        for node in ast.walk(child)
    }
    if at_top_only:
        skipped |= {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for node in ast.walk(function)
            if node is not function
        }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            yield from ((node.module or "", alias.name, node.lineno) for alias in node.names)


def own_imports(path: Path, *, at_top_only: bool = False) -> Iterator[tuple[str, int]]:
    """Modules of bncli that a file imports: `from bncli.formats import npy` is formats.npy."""
    for module, name, line in imports(path, at_top_only=at_top_only):
        if module.split(".")[0] != "bncli":
            continue
        inner = ".".join(module.split(".")[1:])
        deeper = f"{inner}.{name}".strip(".")
        yield (deeper if deeper in MODULES else inner), line


def test_every_module_has_a_room() -> None:
    rooms = {room for level in LEVELS for room in level} | ANYWHERE
    assert {room_of(module) for module in MODULES} <= rooms


@pytest.mark.parametrize("module", sorted(set(MODULES) - ANYWHERE))
def test_imports_run_downward(module: str) -> None:
    for imported, line in own_imports(MODULES[module]):
        if imported in ANYWHERE or room_of(imported) == room_of(module):
            continue
        assert level_of(imported) > level_of(module), (
            f"bncli/{module} line {line} imports {imported}, which is not below"
        )


def test_errors_import_nothing_of_ours() -> None:
    assert list(own_imports(MODULES["errors"])) == []


def test_no_import_cycles() -> None:
    graph = {m: {i for i, _ in own_imports(path) if i != m} for m, path in MODULES.items() if m}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        if module in done:
            return
        for imported in graph.get(module, ()):
            visit(imported, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())
    assert done >= set(graph)


@pytest.mark.parametrize("library", HOMES)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    users = set()
    for path in FILES:
        if any(module.split(".")[0] == library for module, _, _ in imports(path)):
            users.add(path.relative_to(PACKAGE).with_suffix("").as_posix())
    strangers = {u for u in users if not any(u == h or u.startswith((f"{h}/", f"{h}_")) for h in HOMES[library])}
    assert strangers == set()


def test_formats_are_reached_through_their_table_alone() -> None:
    rooms = {where.partition(":")[0].removeprefix("bncli.").split(".")[1] for where in FORMATS.values()}
    users = {
        module
        for module, path in MODULES.items()
        for imported, _ in own_imports(path)
        if imported.split(".")[0] == "formats" and imported.split(".")[1:2] and imported.split(".")[1] in rooms
    }
    assert {user for user in users if user.split(".")[0] != "formats" or user.split(".")[1:2][0] not in rooms} == set()


def test_work_is_spread_by_executors_alone() -> None:
    """Pools are made in one place. The HDF5 sink has one of its own: it compresses chunks while others are computed."""
    pools = {"ThreadPoolExecutor", "ProcessPoolExecutor", "multiprocessing"}
    users = {name for name, path in MODULES.items() for module, found, _ in imports(path) if {module, found} & pools}
    assert users <= {
        "engine.executors",
        "engine.executors.processes",
        *(name for name in MODULES if name.startswith("formats.hdf5.")),
    }


def test_only_known_libraries_are_imported() -> None:
    known = set(HOMES) | {"bncli", "numpy", "typing_extensions"} | set(sys.stdlib_module_names)
    found = {module.split(".")[0] for path in FILES for module, _, _ in imports(path)}
    assert found <= known


def test_every_file_says_what_it_is_and_is_annotated() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        assert any(m == "__future__" for m, _, _ in imports(path)) or not tree.body[1:], path


# --- the README


def commands() -> dict[str, click.Command]:
    context = click.Context(cli.cli)
    found = {name: cli.cli.get_command(context, name) for name in cli.cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def test_commands_are_registered() -> None:
    assert (
        set(commands())
        == set(cli.COMMANDS)
        == {p.stem.rstrip("_") for p in (PACKAGE / "cli").glob("*.py")} - {"", "__init", "options", "running"}
    )


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES if path.stem != "reference")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_pages_that_people_wrote_mention_every_command_and_option(name: str) -> None:
    assert re.search(rf"\bbn {name}\b", TEXT)
    options = [o for p in commands()[name].params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")]
    missing = [o for o in options if not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w-])", TEXT)]
    assert missing == []


def test_pages_offer_no_option_that_does_not_exist() -> None:
    real = {o for c in commands().values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    lines = [line for line in TEXT.splitlines() if re.match(r"\s*(\$ )?bn ", line)]
    used = {o for line in lines for o in re.findall(r"(?<!\S)--[a-z][a-z-]*", line.split(" #")[0])}
    assert used <= real | {"--help", "--version"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_has_help_and_a_group(name: str) -> None:
    for parameter in commands()[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert getattr(parameter, "group", None) in GROUPS, parameter.name


# --- options, each declared once


SPECS = {"fit": FitOptions, "apply": ApplySpec, "merge": MergeSpec}


@pytest.mark.parametrize("command", SPECS)
def test_the_command_line_has_every_declared_option(command: str) -> None:
    declared = options_of(SPECS[command])
    on_the_line = {p.name: p.declared for p in commands()[command].params if isinstance(p, Grouped)}
    assert {name: on_the_line.get(name) for name in declared} == declared
    assert set(on_the_line) - set(declared) <= {
        "output", "force", "as_json", "quiet", "debug", "plugins", "resume", "dry_run",
    }  # fmt: skip


@pytest.mark.parametrize("function", [bncli.fit, bncli.apply, bncli.merge])
def test_the_signature_has_every_declared_option(function: Callable[..., object]) -> None:
    """Names and defaults are those of the declarations; nothing is taken by **options."""
    parameters = inspect.signature(function).parameters
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    spec = SPECS[function.__name__]
    assert set(options_of(spec)) == set(parameters) - {"source", "output", "progress", "stats", "where"}
    for field in dataclasses.fields(spec):
        assert parameters[field.name].default in (field.default, UNSET), field.name


def test_choices_stand_once() -> None:
    """The presets that can be named are those there are, and no list of choices is written out a second time."""
    assert tuple(PRESETS) == choices.PRESET_NAMES
    lists = {name: value for name, value in vars(choices).items() if name.isupper() and isinstance(value, tuple)}
    for path in FILES:
        if name_of(path) == "choices":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Tuple, ast.List)) and len(node.elts) > 2:
                written = {e.value for e in node.elts if isinstance(e, ast.Constant)}
                for name, values in lists.items():
                    assert not written or written != set(values), f"{path}: {name} is in bncli/choices.py"


# --- small enough to be read


def lines_of(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None and first.end_lineno is not None
    return (
        (function.end_lineno or 0)
        - function.lineno
        + 1
        - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    """450 lines, 50 lines, 8 parameters; but what declares all options of a command has as many parameters as those."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    declared = {"fit", "apply", "merge", "write", "read"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and not (node.name in declared and node.col_offset == 0):
            assert lines_of(node) <= 50, node.name
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([a for a in arguments if a.arg not in ("self", "cls")]) <= 8, node.name


# --- starts are light


def loaded_after(code: str) -> set[str]:
    script = (
        f"import sys\n{code}\nprint('\\n'.join(sorted(m for m in sys.modules if '.' not in m)), file=sys.__stderr__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_import_is_light() -> None:
    assert loaded_after("import bncli; bncli.__version__; dir(bncli)") & {"numpy", "h5py", "click", "rich"} == set()


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["fit", "--help"], ["inspect", "--help"], ["nonsense"]])
def test_help_is_light(args: list[str]) -> None:
    code = f"from bncli.cli import main\ntry: main({args!r})\nexcept SystemExit: pass"
    loaded = loaded_after(code + "\nsys.stderr = open('/dev/null', 'w')")
    assert "click" in loaded
    assert loaded & {"numpy", "h5py", "rich"} == set()


def test_npy_does_not_need_rich() -> None:
    assert "rich" not in loaded_after("import bncli.engine.fit")


def test_public_names_are_there() -> None:
    import bncli

    for name in bncli.__all__:
        assert getattr(bncli, name) is not None
    assert set(dir(bncli)) == set(bncli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bncli.nonsense


def test_help_fits_eighty_columns() -> None:
    for name, command in {"": cli.cli, **commands()}.items():
        context = click.Context(command, info_name=name, terminal_width=80, help_option_names=["-h", "--help"])
        assert max(map(len, command.get_help(context).splitlines())) <= 80, name
