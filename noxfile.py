"""Every check of the project, as sessions: `nox -l` lists them, `nox -s tests` runs one.

Works with plain virtualenv and pip; where uv is installed, nox uses it instead.
"""

import tarfile
import tempfile
import zipfile
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
# Also where CI is set: a missing interpreter is skipped, in a line of its own.
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
MEASURED = "3.12"  # the one Python whose run has the branches counted
OTHER_LOOPS = ["asyncio-eager", "uvloop"]
LOOP_TESTS = [
    "tests/core/dispatch",
    "tests/core/test_contract.py",
    "tests/core/test_context.py",
    "tests/core/test_drainer.py",
    "tests/web/test_lifespan.py",
    "tests/web/test_overload.py",
    "tests/web/test_streams.py",
]

PYPROJECT = nox.project.load_toml("pyproject.toml")


def group(name: str) -> tuple[str, ...]:
    """Return a dependency group as plain requirements, for installers that know no groups."""
    return nox.project.dependency_groups(PYPROJECT, name)


def install(session: nox.Session, name: str) -> None:
    """Install the project and a dependency group, without what cannot be compiled here."""
    wanted = group(name)
    try:
        session.install("-e", ".", *wanted)
    except CommandFailed:
        compiled = {*group("compiled"), *group("compiled-servers")}
        session.install("-e", ".", *(each for each in wanted if each not in compiled))
        for each in (each for each in wanted if each in compiled):
            try:
                session.install(each)
            except CommandFailed:
                session.warn(f"left out: {each} cannot be installed here; its tests are skipped")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the suite on asyncio and trio; arguments go to pytest."""
    install(session, "test")
    session.run("pytest", *(session.posargs or ["-n", "auto"]))


@nox.session(python=MEASURED)
def coverage(session: nox.Session) -> None:
    """Run the suite, and fail where a branch of the package was not taken."""
    install(session, "coverage")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "-n", "auto", env={"EVENTKIT_DRIVERS": "all"})
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session(python=PYTHONS)
def matrix(session: nox.Session) -> None:
    """Run the suite on each Python found, on asyncio and trio."""
    install(session, "matrix")
    session.run("pytest", "-n", "auto", *session.posargs)


@nox.session(python=PYTHONS)
def loops(session: nox.Session) -> None:
    """Run what depends on the event loop on each Python found, on asyncio's other loops."""
    install(session, "matrix")
    session.run(
        "pytest",
        "-n",
        "auto",
        *(session.posargs or LOOP_TESTS),
        env={"EVENTKIT_BACKENDS": ",".join(OTHER_LOOPS)},
    )


@nox.session(python="3.11")
def plugin(session: nox.Session) -> None:
    """Run the testing kit's tests on its oldest pytest, in random order, beside pytest-asyncio."""
    session.install("-e", ".", "pytest==8.0.*", *group("plugin"))
    filters = PYPROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]
    options = ["-c", "tests/kit/oldest.ini", "--rootdir", "."]
    options += ["-o", "filterwarnings=" + "\n".join(filters)]
    session.run("pytest", *options, *(session.posargs or ["tests/kit"]))


@nox.session
def servers(session: nox.Session) -> None:
    """Serve on uvicorn, gunicorn, hypercorn and granian, and end them with work in flight."""
    session.install("-e", ".", *group("servers"))
    session.run("pytest", *(session.posargs or ["tests/servers"]))


@nox.session
def crash(session: nox.Session) -> None:
    """Kill, stop and cut off processes with durable deliveries, and count what is left.

    Arguments go to pytest: `--soak 600` has each soak at random take ten minutes, and paths choose
    some of `tests/crash`.
    """
    install(session, "crash")
    chosen = any(each.startswith("tests/") for each in session.posargs)
    # They mostly wait. Their own limits end what hangs; a soak takes as long as it is told.
    options = ["-n", "4", "-o", "faulthandler_timeout=0"]
    session.run("pytest", *options, *([] if chosen else ["tests/crash"]), *session.posargs)


@nox.session
def brokers(session: nox.Session) -> None:
    """Have services talk by NATS, RabbitMQ, Redis and Kafka, and kill both kinds of processes.

    Arguments go to pytest: `--soak 600` has each soak take ten minutes, and paths choose some of
    `tests/brokers`.
    """
    install(session, "brokers")
    chosen = any(each.startswith("tests/") for each in session.posargs)
    # They mostly wait, too. What restarts a broker of its own stays on one worker, which has it.
    options = ["-n", "4", "--dist", "loadgroup", "-o", "faulthandler_timeout=0"]
    session.run("pytest", *options, *([] if chosen else ["tests/brokers"]), *session.posargs)


@nox.session
def load(session: nox.Session) -> None:
    """Compare eventkit, BackgroundTasks and fastapi-events under load; a quarter of an hour.

    Arguments go to the benchmark: `--runs 1 --seconds 2 --slow-seconds 5` is a quick look, and
    `--out docs/load` keeps what was measured.
    """
    session.install("-e", ".", *group("load"))
    session.run("python", "-m", "benchmarks.load", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what users pay, in CPU time, beside the peers; half an hour.

    Arguments go to the benchmarks: `behind served` chooses some, `--quick` is a first look,
    `--check` fails where a goal is missed, `--out docs/benchmarks` keeps what was measured.
    """
    session.install("-e", ".", *group("bench"))
    try:
        session.install(*group("peers"))
    except CommandFailed:
        for peer in group("peers"):
            session.install(peer, success_codes=range(256))  # the benchmarks name what is missing
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, that imports go downwards only, and the workflows' security."""
    session.install("-e", ".", *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")
    session.run("zizmor", "--offline", "--quiet", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check all code with mypy and pyright, both strict, and the public API for unknown types."""
    session.install("-e", ".", *group("types"))
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "eventkit", "--ignoreexternal")


@nox.session(python="3.11")
def minimums(session: nox.Session) -> None:
    """Run the suite on the oldest Python with the oldest releases that pyproject.toml admits.

    Old releases leave resources open, and nobody will mend them: here a warning is only shown.
    """
    extras = PYPROJECT["project"]["optional-dependencies"]
    bridge = [bound.replace(">=", "==") for bound in extras.pop("faststream")]
    bounds = [
        *PYPROJECT["project"]["dependencies"],
        *(line for each in extras.values() for line in each),
    ]
    oldest = [bound.replace(">=", "==") for bound in bounds]
    # Starlette's test client takes httpx where httpx2 is missing. That and FastStream want a newer
    # AnyIO, so the bridge has a run of its own.
    newer = ("httpx2", "faststream")
    tools = [line for line in group("test") if not line.startswith(newer)]
    session.install("-e", ".", *oldest, *tools)
    session.run("pytest", "-n", "auto", "-W", "default", *session.posargs)
    clients = [line for line in group("test") if line.startswith("faststream")]
    session.install("-e", ".", *clients, *bridge)
    session.run("pytest", "-n", "auto", "-W", "default", "tests/faststream")


@nox.session(reuse_venv=False)
def package(session: nox.Session) -> None:
    """Build sdist and wheel, look inside, and import the wheel where only the core is installed.

    `nox -s package -- dist` keeps both in `dist/`.
    """
    session.install("build")
    with tempfile.TemporaryDirectory() as name:
        built = Path(*(session.posargs or [name])).absolute()
        session.run("python", "-m", "build", "--outdir", str(built))
        (wheel,) = built.glob("*.whl")
        (sdist,) = built.glob("*.tar.gz")
        if problems := [*wheel_problems(wheel), *sdist_problems(sdist)]:
            session.error("\n".join(problems))
        session.run("python", "-m", "venv", f"{name}/venv")
        session.run(f"{name}/venv/bin/pip", "install", "--quiet", str(wheel), external=True)
        session.chdir(name)
        session.run(f"{name}/venv/bin/python", "-c", IMPORT_ALL, external=True, log=False)


@nox.session
def demo(session: nox.Session) -> None:
    """Show the example shop at work; `nox -s demo -- --serve` keeps it open for a browser.

    `nox -s demo -- two-services` shows two services and a broker. `--trace`, with either, shows one
    order as OpenTelemetry sees it. `--svg docs/timeline.svg` draws the picture of the README anew.
    """
    two_services = "two-services" in session.posargs
    tracing = group("tracing") if "--trace" in session.posargs else ()
    session.install("-e", ".", *group("two-services" if two_services else "demo"), *tracing)
    session.run("python", "-m", "examples.demo", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into `site/`, test it, and follow the tutorial as its readers do.

    `nox -s docs -- --serve` serves it. Other arguments go to pytest.
    """
    if "--serve" in session.posargs:
        session.install("-e", ".", *group("docs"))
        session.run("zensical", "serve", *(each for each in session.posargs if each != "--serve"))
        return
    extras = ".[cli,fastapi,faststream,outbox]"  # as the tutorial installs them
    session.install("-e", extras, *group("docs"), *group("tutorial"))
    session.run("zensical", "build", "--clean", "--strict")
    if session.posargs:
        session.run("pytest", *session.posargs)
    else:
        # Apart: an event loop of Playwright's runs in the thread of the first ones.
        session.run("pytest", "tests/site")
        session.run("pytest", "tests/tutorial")


def wheel_problems(path: Path) -> list[str]:
    """Say what the wheel lacks, and what it holds beside the package and its metadata."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    licence = any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    modules = {"eventkit_pytest.py", *(str(path) for path in Path("eventkit").rglob("*.py"))}
    return [
        *(f"the wheel lacks {name}" for name in sorted({"eventkit/py.typed", *modules} - names)),
        *([] if licence else ["the wheel lacks LICENSE"]),
        *(
            f"the wheel holds {name}"
            for name in sorted(names)
            if not name.split("/")[0].endswith((".dist-info", "eventkit", "eventkit_pytest.py"))
        ),
    ]


def sdist_problems(path: Path) -> list[str]:
    """Say which of the files that a packager needs are missing from the sdist."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CHANGELOG.md", "LICENSE", "README.md", "eventkit/py.typed", "pyproject.toml"}
    return [f"the sdist lacks {name}" for name in sorted(needed - names)]


# Runs in an environment that has the wheel and the core dependencies, nothing else.
IMPORT_ALL = """
import importlib, pkgutil, sys
import eventkit

optional = {"click", "fastapi", "faststream", "opentelemetry", "pydantic", "pytest", "rich"}
optional |= {"sqlalchemy", "stamina", "trio"}
if pulled := optional & sys.modules.keys():
    sys.exit(f"import eventkit pulls in {sorted(pulled)}")
for module in pkgutil.walk_packages(eventkit.__path__, "eventkit."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name not in optional:
            raise
        print(f"{module.name} needs {error.name}")
    else:
        print(f"{module.name} imports")
"""
