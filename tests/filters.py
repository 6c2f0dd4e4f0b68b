"""The warning filters of pyproject.toml, also for the projects that tests make up."""

import tomllib
from pathlib import Path

_PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())

# As pytest takes them, the later one wins: warnings of our modules are errors, others are not.
FILTERS: list[str] = _PYPROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]


def filter_options(*modules: str) -> list[str]:
    """Options of pytest with which warnings of these modules are errors as well."""
    ours = [f"error:::{module}$" for module in modules]
    return ["-o", "filterwarnings=" + "\n".join([*FILTERS, *ours])]
