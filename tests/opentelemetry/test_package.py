"""What importing takes, and what is said where OpenTelemetry is missing."""

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_eventkit_imports_no_opentelemetry() -> None:
    ran = run(
        "import sys, eventkit, eventkit.starlette\n"
        "print([each for each in sys.modules if each.startswith('opentelemetry')])"
    )

    assert ran.stdout.strip() == "[]", ran.stderr


def test_the_api_package_alone_is_imported() -> None:
    ran = run(
        "import sys, eventkit.opentelemetry\n"
        "print([each for each in sys.modules if each.startswith("
        "('opentelemetry.sdk', 'opentelemetry.semconv', 'opentelemetry.instrumentation'))])"
    )

    assert ran.stdout.strip() == "[]", ran.stderr


def test_without_the_package_one_line_says_what_to_install() -> None:
    ran = run("import sys\nsys.modules['opentelemetry'] = None\nimport eventkit.opentelemetry")

    assert ran.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: eventkit.opentelemetry needs opentelemetry, which is not installed: "
        "install fastapi-eventkit[opentelemetry]"
    )


def test_an_error_of_another_package_is_shown_as_it_is() -> None:
    ran = run(
        "import builtins\n"
        "real = builtins.__import__\n"
        "def fake(name, *rest):\n"
        "    if name == 'opentelemetry':\n"
        "        raise ModuleNotFoundError('No module named importlib_metadata', "
        "name='importlib_metadata')\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = fake\n"
        "import eventkit.opentelemetry\n"
    )

    assert ran.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: No module named importlib_metadata"
    )
