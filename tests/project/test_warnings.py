"""The warning filters of pyproject.toml: our own warnings fail a run, those of others do not."""

import pytest

from tests.filters import filter_options

# A package of somebody else. It warns about itself, about its callers, and about another package.
LIBRARY = r'''
import warnings

warnings.warn("about itself", DeprecationWarning)

from another import old
old()


def deprecated():
    warnings.warn("deprecated() is deprecated", DeprecationWarning, stacklevel=2)


def careless():
    old()
    warnings.warn("the library is old", FutureWarning)


def free(thing):
    """Drop the last reference."""
    thing.clear()


def warn_as(module, file="file.py"):
    """Warn as if that module had done what is warned about."""
    warnings.warn_explicit("old", DeprecationWarning, file, 1, module=module)
'''

ANOTHER = """
import warnings

def old():
    warnings.warn("old() is deprecated", PendingDeprecationWarning, stacklevel=2)
"""

OTHERS_WARN = """
import threading

import escaped
import library
import pytest

def test_a_library_warns_when_it_is_imported():
    assert library

def test_a_library_warns_about_itself_and_calls_what_is_deprecated():
    library.careless()

def test_a_library_warns_in_a_thread():
    thread = threading.Thread(target=library.careless)
    thread.start()
    thread.join()

def test_a_library_has_a_warning_of_the_compiler():
    assert escaped

@pytest.mark.parametrize(
    "module", ["testsuite", "eventkits", "a.tests", "_pytest.python", "asyncio.events", "sys"]
)
def test_a_module_warns_whose_name_is_much_like_ours(module):
    library.warn_as(module)

@pytest.mark.parametrize("folder", ["eventkit", "tests"])
def test_a_file_of_a_library_lies_below_a_folder_of_our_name(folder):
    path = f"/home/me/{folder}/.nox/tests/lib/python3/site-packages/library/tests/some"
    library.warn_as(path, path + ".py")
"""

WE_WARN = """
import threading

import library
import pytest

def test_we_call_what_is_deprecated():
    library.deprecated()

def test_we_import_what_is_deprecated():
    import tests.deprecating

@pytest.mark.parametrize(
    "module",
    [
        "eventkit", "eventkit._core.bus", "eventkit_pytest", "tests.kit.test_plugin",
        "benchmarks.harness", "examples.shop.app", "/home/me/ours/eventkit/_bus",
        "C:\\\\ours\\\\tests\\\\conftest", "/home/me/eventkit/benchmarks/harness",
    ],
)
def test_a_module_of_ours_warns(module):
    library.warn_as(module)

def test_a_library_closes_what_we_left_open(tmp_path):
    library.free([open(tmp_path / "file", "w")])

def test_a_library_drops_a_coroutine_that_we_did_not_await():
    async def never(): ...
    library.free([never()])

def test_an_error_in_a_finalizer_is_seen_by_nobody():
    class Failing:
        def __del__(self): raise OSError
    library.free([Failing()])

def test_an_error_in_a_thread_is_seen_by_nobody():
    def fail(): raise OSError
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()

def test_a_test_returns_something():
    return 1
"""

DEPRECATING = """
from library import deprecated
deprecated()
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with our filters and two libraries."""
    pytester.makeini("[pytest]\npythonpath = .")
    libraries = pytester.mkdir("lib") / "site-packages"
    libraries.mkdir()
    (libraries / "library.py").write_text(LIBRARY)
    (libraries / "another.py").write_text(ANOTHER)
    (libraries / "escaped.py").write_text(r'text = "\d"')
    pytester.mkpydir("tests").joinpath("deprecating.py").write_text(DEPRECATING)
    monkeypatch.setenv("PYTHONPATH", str(libraries))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # what is compiled, is warned about
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    return pytester


def run(project: pytest.Pytester, tests: str) -> pytest.RunResult:
    (project.path / "tests" / "test_it.py").write_text(tests)
    return project.runpytest_subprocess(*filter_options())


def test_a_warning_that_another_package_raises_fails_nothing_and_is_shown(
    project: pytest.Pytester,
) -> None:
    result = run(project, OTHERS_WARN)

    result.assert_outcomes(passed=12)
    result.stdout.fnmatch_lines(
        ["*DeprecationWarning: about itself", "*FutureWarning: the library*"]
    )


def test_a_warning_of_ours_or_of_our_mistake_is_an_error(project: pytest.Pytester) -> None:
    result = run(project, WE_WARN)

    result.assert_outcomes(failed=16)


def test_a_warning_of_the_compiler_about_a_test_is_an_error(project: pytest.Pytester) -> None:
    result = run(project, r'def test_it(): assert "\d"')

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*invalid escape sequence*"])
