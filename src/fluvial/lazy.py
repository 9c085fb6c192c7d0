"""Names of a package that are imported when they are first used."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def imported_when_used(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a `__getattr__` of `package` (PEP 562), which imports the names of each module."""
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:  # noqa: N807 - the name that PEP 562 asks for
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")

        value = getattr(import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)  # found without this function from here on

        return value

    return __getattr__
