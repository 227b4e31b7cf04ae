"""Sessions: each backend alone in an environment of its own.

nox                    lint, types and the tests of the three backends
nox -s train-jax       trains; what follows -- goes to `multilstm train`
nox -s bench           times a training step on all three, in turns
nox -s compare         the same preset from the same weights on all three
nox -s test-faults     kills runs at random moments, over and over
nox -s fuzz            feeds broken files to what reads them
nox -s docs            writes the reference of the API to site/
nox -s coverage        the tests, and what they covered on all three together
"""

import os
from pathlib import Path

import nox

BACKENDS = ("jax", "torch", "tensorflow")
CONSTRAINTS = ("-c", "constraints.txt")
PROJECT = nox.project.load_toml("pyproject.toml")

nox.needs_version = ">=2025.2.9"
nox.options.sessions = [
    "lint",
    "types",
    *(f"test-{backend}" for backend in BACKENDS),
]
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True


def install(session: nox.Session, *packages: str, group: str = "") -> None:
    """Installs packages and a dependency group in their tested versions."""
    if group:
        packages += nox.project.dependency_groups(PROJECT, group)
    session.install(*CONSTRAINTS, *packages)


def install_backend(session: nox.Session, backend: str, group: str) -> None:
    """Installs this project with one backend, and names it to Keras."""
    install(session, "-e", f".[{backend}]", group=group)
    session.env.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="2")


@nox.session
def lint(session: nox.Session) -> None:
    install(session, group="lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    install(session, group="types")
    session.run("mypy")


def test(session: nox.Session, backend: str) -> None:
    install_backend(session, backend, group="test")
    if backend == "torch":  # which brings it along for GPUs only
        install(session, "triton; sys_platform == 'linux'")
    session.env["COVERAGE_FILE"] = f".coverage.{backend}"
    # The models of the tests are tiny. PyTorch's threads would only wait for
    # each other, ten times longer where the machine has other work.
    session.env.setdefault("OMP_NUM_THREADS", "1")
    # JAX compiles the same tiny steps for many tests: once is enough.
    cache = session.create_tmp()
    session.env.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    for at_least in ("COMPILE_TIME_SECS", "ENTRY_SIZE_BYTES"):
        session.env[f"JAX_PERSISTENT_CACHE_MIN_{at_least}"] = "0"
    # A file of tests stays in one process, with what its tests share.
    processes = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadfile")
    session.run(
        *("pytest", "--cov", "--cov-report=", "--durations=10"),
        *(*processes, *session.posargs),
    )


def train(session: nox.Session, backend: str) -> None:
    install_backend(session, backend, group="")
    session.run("multilstm", "train", *session.posargs)


for _backend in BACKENDS:
    for _function in (test, train):
        nox.session(name=f"{_function.__name__}-{_backend}")(
            lambda session, f=_function, b=_backend: f(session, b)
        )


@nox.session
def bench(session: nox.Session) -> None:
    """Times each backend whose test or train environment is there."""
    install(session, "-e", ".", group="")
    sizes = () if session.posargs else ("--batch-size", "20,64")
    session.run("multilstm", "bench", *sizes, *session.posargs)


@nox.session
def compare(session: nox.Session) -> None:
    """Trains on each backend whose test or train environment is there."""
    install(session, "-e", ".", group="")
    session.run("multilstm", "compare", *session.posargs)


@nox.session(name="test-faults", venv_backend="none")
def test_faults(session: nox.Session) -> None:
    """Kills runs of each backend whose test environment is there.

    Then lets one go on on one backend after the other.
    """
    pythons = {}
    for backend in BACKENDS:
        python = Path(f".nox/test-{backend}/bin/python").absolute()
        if python.exists():
            pythons[backend] = str(python)
    if not pythons:
        session.error(
            "No test environment is there. Make one with, for instance: "
            "nox -s test-torch --install-only"
        )
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2"}
    for backend, found in pythons.items():
        session.run(
            *(found, "backends_test/faults.py", *session.posargs),
            env=quiet | {"KERAS_BACKEND": backend},
            external=True,
        )
    places = [f"{backend}={python}" for backend, python in pythons.items()]
    session.run(
        *(next(iter(pythons.values())), "backends_test/resume_elsewhere.py"),
        *places,
        env=quiet,
        external=True,
    )


@nox.session
def fuzz(session: nox.Session) -> None:
    """Feeds broken files to what reads them, for ten minutes."""
    install_backend(session, "torch", group="fuzz")
    script = Path("backends_test/fuzz_readers.py").absolute()
    with session.chdir(session.create_tmp()):  # where crashes are written
        session.run("python", str(script), *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Writes the reference of the API, as HTML."""
    install_backend(session, "jax", group="docs")
    # What is imported when it is first used must be there to be described.
    code = (
        "import pathlib, pdoc, multilstm\n"
        "for name in multilstm.__all__: getattr(multilstm, name)\n"
        "more = 'optimizers ops ops.reference bench ranking choosing '\n"
        "more = [*more.split(), 'selection']\n"
        "pages = ['multilstm', *(f'multilstm.{name}' for name in more)]\n"
        "pdoc.render.configure(docformat='google')\n"
        "pdoc.pdoc(*pages, output_directory=pathlib.Path('site'))\n"
    )
    session.run("python", "-W", "error", "-c", code)


@nox.session(requires=[f"test-{backend}" for backend in BACKENDS])
def coverage(session: nox.Session) -> None:
    install(session, "coverage[toml]")
    session.run("coverage", "combine", "--keep")
    session.run("coverage", "report", *session.posargs)
    if os.environ.get("CI") is None:
        session.run("coverage", "html")
