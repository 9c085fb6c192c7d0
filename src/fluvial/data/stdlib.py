"""The embedded text: Python's own standard library, as installed on the machine.

Each site owns the sources of some packages, which makes a natural non-IID split. Two more groups
belong to no site: `PUBLIC` is text that a server may read (TGAP on public text), `PRETRAIN` is the
text that `scripts/pretrain_tiny.py` trained the embedded model on. The three groups are disjoint,
and no file is in two of them.
"""

import sys
import sysconfig
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fluvial.errors import ConfigError

# A name is a module (`tarfile.py`) or a package (`email/`); what a Python version lacks is passed
# over, as long as the site keeps MIN_CHARS of text.
SITES: dict[str, tuple[str, ...]] = {
    "archives": ("tarfile", "zipfile", "gzip", "bz2", "lzma", "shutil"),
    "asyncio": ("asyncio",),
    "email": ("email", "mailbox", "quopri"),
    "numbers": ("_pydecimal", "statistics", "fractions", "numbers", "random", "heapq", "colorsys"),
    "processes": ("multiprocessing", "concurrent", "subprocess", "threading"),
    "unittest": ("unittest", "doctest"),
    "web": ("http", "urllib", "wsgiref", "socketserver", "xmlrpc"),
    "xml": ("xml", "plistlib"),
}
PUBLIC: tuple[str, ...] = (
    "argparse", "inspect", "dataclasses", "datetime", "_pydatetime", "ipaddress", "smtplib",
    "imaplib", "ftplib", "pathlib", "configparser", "logging", "enum", "typing", "ast", "functools",
    "platform", "ssl", "uuid", "calendar", "contextlib", "string", "textwrap", "traceback",
    "tempfile", "selectors", "socket", "queue",
)  # fmt: skip
PRETRAIN: tuple[str, ...] = (
    "idlelib", "distutils", "lib2to3", "tkinter", "turtledemo", "turtle", "importlib", "json",
    "collections", "re", "ctypes", "curses", "zoneinfo", "tomllib", "venv", "dbm", "sqlite3",
    "pydoc", "pydoc_data", "pickle", "pickletools", "difflib", "pdb", "bdb", "locale", "optparse",
    "os", "codecs", "cgi", "aifc", "smtpd", "sysconfig", "ntpath", "posixpath", "_collections_abc",
    "pstats", "trace", "dis", "_strptime", "webbrowser", "pkgutil", "pprint", "modulefinder",
    "telnetlib", "profile", "mimetypes", "nntplib", "_pyio", "tokenize", "copy", "copyreg",
    "shelve", "weakref", "timeit", "types", "warnings", "wave", "glob", "fnmatch", "filecmp",
    "fileinput", "getopt", "gettext", "graphlib", "hashlib", "hmac", "html", "io", "keyword",
    "linecache", "netrc", "opcode", "operator", "poplib", "sched", "secrets", "shlex", "signal",
    "site", "struct", "symtable", "tabnanny", "code", "codeop", "compileall", "cmd", "cProfile",
    "csv", "base64", "bisect", "abc", "runpy", "rlcompleter", "reprlib", "stringprep", "tty", "pty",
)  # fmt: skip

HELD_OUT_SHARE = 0.08  # of a site's characters, in whole files
LARGEST_HELD_OUT = 0.15  # a file with a larger share of the site's text is never held out
CHUNK_CHARS = 4_000
MIN_CHARS = 40_000


@dataclass(frozen=True)
class Document:
    """A stretch of source text of at most `CHUNK_CHARS` characters, cut at a line; `name` says file
    and position."""

    name: str
    text: str


@dataclass(frozen=True)
class SiteText:
    """The text of one site: documents to train on, and documents of other files to measure on."""

    train: list[Document]
    heldout: list[Document]


def site_names() -> tuple[str, ...]:
    """Return the names of the eight sites, sorted."""
    return tuple(sorted(SITES))


def site_text(site: str, share: float = HELD_OUT_SHARE) -> SiteText:
    """Return all text of one site.

    Whole files with at least `share` of the characters are held out, as far as files are small
    enough, chosen by a checksum of their names. Raises `ConfigError` for an
    unknown site and for a Python without library sources.
    """
    if site not in SITES:
        raise ConfigError(
            f"data.source='stdlib' has no site {site!r}; its sites are {', '.join(site_names())}"
        )

    files = _enough(f"site {site!r}", _sources(SITES[site]))
    total = sum(len(text) for text in files.values())
    heldout: set[str] = set()

    for name in sorted(files, key=lambda name: zlib.crc32(name.encode())):
        if sum(len(files[held]) for held in heldout) < share * total and (
            len(files[name]) <= LARGEST_HELD_OUT * total
        ):
            heldout.add(name)

    return SiteText(
        train=_documents({name: text for name, text in files.items() if name not in heldout}),
        heldout=_documents({name: text for name, text in files.items() if name in heldout}),
    )


def public_packages() -> dict[str, list[Document]]:
    """Return the public text, by package: a server may use it to pre-train a codec."""
    _enough("the public text", _sources(PUBLIC))
    packages = {name: _documents(_sources((name,))) for name in PUBLIC}
    return {name: documents for name, documents in packages.items() if documents}


def pretraining_documents() -> list[Document]:
    """Return text for pre-training a model from nothing, disjoint from all other text."""
    return _documents(_enough("the pre-training text", _sources(PRETRAIN)))


def _enough(what: str, files: dict[str, str]) -> dict[str, str]:
    characters = sum(len(text) for text in files.values())
    if characters < MIN_CHARS:
        raise ConfigError(
            f"data.source='stdlib': {what} needs the library sources of this Python "
            f"({sys.version.split()[0]}, {_library()}), but only {characters} of {MIN_CHARS} "
            "characters are there. Install them (Debian: libpython3-stdlib; embedded builds often "
            "ship only compiled files), or set data.source to your own files."
        )

    return files


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources(names: Iterable[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for name in names:
        for path in _files(_library(), name):
            files[path.relative_to(_library()).as_posix()] = path.read_text(
                encoding="utf-8", errors="replace"
            )

    return files


def _files(library: Path, name: str) -> list[Path]:
    module = library / f"{name}.py"
    package = library / name
    inside = package.rglob("*.py") if package.is_dir() else []
    skipped = {"test", "tests", "idle_test", "__pycache__"}
    found = [path for path in inside if not skipped & set(path.relative_to(library).parts)]

    return sorted(([module] if module.is_file() else []) + found)


def _documents(files: dict[str, str]) -> list[Document]:
    return [document for name, text in files.items() for document in _chunks(name, text)]


def _chunks(name: str, text: str) -> list[Document]:
    chunks = []
    lines = list[str]()
    size = 0

    for line in text.splitlines(keepends=True):
        if lines and size + len(line) > CHUNK_CHARS:
            chunks.append("".join(lines))
            lines = []
            size = 0

        lines.append(line)
        size += len(line)

    if lines:
        chunks.append("".join(lines))

    return [
        Document(f"{name}#{number}", chunk) for number, chunk in enumerate(chunks) if chunk.strip()
    ]
