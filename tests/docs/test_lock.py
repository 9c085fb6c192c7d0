"""The lock file pins what is installed: everything that Fluvial needs, at the version that the
tests run with."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support import ROOT


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in found}


def requirements() -> list[Requirement]:
    """Return what pyproject.toml asks for, extras included, without the extras that name others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(each for extra in extras for each in extra)]
    return [asked for asked in map(Requirement, lines) if asked.name != project["name"]]


def needed() -> dict[str, Version]:
    """Return every installed distribution that pyproject.toml asks for, with what these ask for, by
    name."""
    waiting = requirements()
    found = dict[str, Version]()
    seen = set[tuple[str, frozenset[str]]]()

    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))

        if key in seen:
            continue

        seen.add(key)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # `make install` leaves the tools out

        found[name] = Version(installed.version)
        for line in installed.requires or []:
            below = Requirement(line)
            marks = [{"extra": extra} for extra in (*requirement.extras, "")]
            if below.marker is None or any(below.marker.evaluate(mark) for mark in marks):
                waiting.append(below)

    return found


def test_the_lock_pins_what_is_installed() -> None:
    lock = pins()
    installed = needed()
    assert len(installed) > 60
    public = {
        name: Version(version.public) for name, version in installed.items()
    }  # 2.13.0+cpu is 2.13.0
    assert {name: lock.get(name) for name in public} == public


def test_the_lock_is_within_the_ranges_of_the_project() -> None:
    lock = pins()

    for asked in requirements():
        assert lock[canonicalize_name(asked.name)] in asked.specifier, asked


def test_the_make_file_installs_from_the_lock() -> None:
    installs = re.findall(r"pip install.*", (ROOT / "Makefile").read_text())
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)


def test_what_is_installed_runs_on_the_oldest_python_of_the_project() -> None:
    """A package for a later patch level of that Python ends the install of those who lack it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = Version(project["requires-python"].removeprefix(">="))
    asked = {name: distribution(name).metadata["Requires-Python"] for name in needed()}
    late = {name: each for name, each in asked.items() if each and oldest not in SpecifierSet(each)}
    assert late == {}
