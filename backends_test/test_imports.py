"""What an import loads, and which module may import which."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import keras
import pytest

import multilstm

PACKAGE = Path(multilstm.__file__).parent
README = Path(__file__).parents[1] / "README.md"


def loaded_by(code):
    """Which of Keras and the frameworks a new Python has after `code`."""
    heavy = {"keras", "jax", "torch", "tensorflow"}
    code += f"\nimport sys\nprint(*sys.modules.keys() & {heavy})"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(process.stdout.splitlines()[-1].split())


# A backend can be chosen until Keras or a framework is loaded.


@pytest.mark.parametrize(
    "code",
    [
        "import multilstm; dir(multilstm)",
        "import multilstm.selection as s; s.is_installed('jax')",
        "import multilstm.presets, multilstm.corpus, multilstm.vocabulary",
        "from multilstm import Corpus, PRESETS, Vocabulary, load_corpus",
    ],
)
def test_import_loads_no_framework(code):
    assert loaded_by(code) == set()


def test_what_is_loaded_would_be_seen():
    assert loaded_by("import sys; sys.modules['jax'] = sys") == {"jax"}


def test_backend_that_is_not_installed_is_told_in_a_line():
    here = keras.config.backend()
    absent = next(name for name in ("tensorflow", "jax") if name != here)
    code = (
        "import os, sys\n"
        f"os.environ['KERAS_BACKEND'] = {absent!r}\n"
        f"sys.modules[{absent!r}] = None\n"
        "from multilstm import LanguageModel\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr.splitlines()[-1]
    assert said.startswith("multilstm.errors.UserError: Keras needs"), said
    assert f"; {absent} is not installed. " in said
    assert re.search(rf"Set KERAS_BACKEND to .*\b{here}\b", said), said


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--help"],
        ["presets"],
        ["corpus", "python-docs"],
        ["report", "nothing.json"],
    ],
)
def test_command_that_needs_no_framework_loads_none(command):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['multilstm', *{command}]\n"
        "try:\n"
        "    runpy.run_module('multilstm', run_name='__main__')\n"
        "except SystemExit as end:\n"
        f"    assert bool(end.code) == {'nothing.json' in command}\n"
    )
    assert loaded_by(code) == set()


# Public names


def test_each_public_name_is_that_of_its_module():
    assert len({*multilstm.__all__}) == len(multilstm.__all__) > 10
    for name in multilstm.__all__:
        value = getattr(multilstm, name)
        assert name in dir(multilstm)
        if callable(value):
            home = importlib.import_module(value.__module__)
            assert getattr(home, name) is value
            assert value.__name__ == name


def test_modules_are_loaded_when_asked_for(monkeypatch):
    for name in ("layers", "ops", "optimizers"):
        module = importlib.import_module(f"multilstm.{name}")
        monkeypatch.delattr(multilstm, name)
        assert getattr(multilstm, name) is module


def test_options_have_the_words_that_the_library_takes():
    """Where the command line may not load the module that has them."""
    from multilstm import adaptation, devices, options, ranking, vocabulary

    assert get_args(options.Method) == adaptation.METHODS
    assert options.UnknownWords == vocabulary.UnknownWords
    assert get_args(devices.Dtype) == tuple(ranking.LOSS_TOLERANCE)


def test_type_checkers_see_the_names_that_are_there():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for statement in block.body:
        module = importlib.import_module(statement.module)
        for alias in statement.names:
            assert alias.asname == alias.name  # a re-export, to mypy
            seen[alias.name] = getattr(module, alias.name)
    assert sorted(seen) == sorted(multilstm.__all__)
    for name, value in seen.items():
        assert getattr(multilstm, name) is value


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match=r"'multilstm' has no .* 'Tokens'"):
        _ = multilstm.Tokens
    with pytest.raises(ImportError, match="Tokens"):
        # The import is what is tested, there is nothing to use.
        from multilstm import Tokens  # noqa: F401


# Which module imports which


def modules_of_the_tree():
    """The modules in the order of the README's file tree.

    A folder comes after its files, from which its `__init__.py` imports.
    """
    (tree,) = re.findall(
        r"```\nmultilstm/\n(.*?)\n\S+/ ", README.read_text(), re.DOTALL
    )
    modules, folder = [], None
    for indent, names in re.findall(
        r"^( {2}| {4})((?:\w+(?:\.py|/) )+)", tree, re.MULTILINE
    ):
        if folder and len(indent) == 2:
            modules.append(folder)
            folder = None
        for name in names.split():
            if name.endswith("/"):
                folder = name.removesuffix("/")
            else:
                prefix = f"{folder}." if len(indent) == 4 else ""
                modules.append(prefix + name.removesuffix(".py"))
    return modules


def modules_of_the_package():
    """The path of each module, by its name within the package."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    return modules


def imported_by(path, modules):
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, inner = name.partition(".")
            while inner and inner not in modules:
                inner = inner.rpartition(".")[0]
            if package == "multilstm":
                yield inner or "__init__"


def test_tree_of_the_readme_has_every_module_once():
    assert sorted(modules_of_the_tree()) == sorted(modules_of_the_package())


def test_modules_import_only_what_stands_above_them():
    order = modules_of_the_tree()
    paths = modules_of_the_package()
    # The doors to all others, which they import when asked.
    assert order[:2] == ["__init__", "__main__"]
    found = {
        (
            module,
            imported,
            imported == "__init__" or imported in order[2:number],
        )
        for number, module in enumerate(order[2:], start=2)
        for imported in imported_by(paths[module], paths)
    }
    assert [pair for *pair, above in found if not above] == []
    assert ("training", "dataset", True) in found
    assert ("ops", "ops.reference", True) in found
