"""The default corpus: the standard library of the Python that runs this, sources with their docstrings.

It is on every machine already. The lists are pinned: names that exist in Python 3.11 to 3.14 and that no
distribution splits off. What the files hold differs between versions, so reports carry `fingerprint()`.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from dovetail.data.corpus import Corpus, read_text
from dovetail.errors import DataError
from dovetail.spec import register
from dovetail.spec.ranges import Count

TRAIN: Sequence[str] = [
    "_collections_abc",
    "_markupbase",
    "_py_abc",
    "_pydecimal",
    "_pyio",
    "_strptime",
    "_threading_local",
    "_weakrefset",
    "abc",
    "argparse",
    "ast",
    "asyncio",
    "base64",
    "bz2",
    "cProfile",
    "cmd",
    "code",
    "codecs",
    "codeop",
    "collections",
    "compileall",
    "concurrent",
    "contextlib",
    "copy",
    "copyreg",
    "csv",
    "ctypes",
    "curses",
    "dataclasses",
    "datetime",
    "dbm",
    "dis",
    "doctest",
    "email",
    "enum",
    "filecmp",
    "fnmatch",
    "ftplib",
    "functools",
    "genericpath",
    "getopt",
    "getpass",
    "gettext",
    "glob",
    "gzip",
    "hashlib",
    "hmac",
    "html",
    "http",
    "importlib",
    "inspect",
    "io",
    "ipaddress",
    "json",
    "keyword",
    "linecache",
    "locale",
    "logging",
    "lzma",
    "mailbox",
    "mimetypes",
    "modulefinder",
    "multiprocessing",
    "netrc",
    "ntpath",
    "numbers",
    "opcode",
    "operator",
    "os",
    "pathlib",
    "pdb",
    "pickle",
    "pickletools",
    "pkgutil",
    "platform",
    "poplib",
    "posixpath",
    "pprint",
    "profile",
    "pstats",
    "pty",
    "py_compile",
    "pyclbr",
    "pydoc",
    "pydoc_data",
    "queue",
    "quopri",
    "random",
    "re",
    "reprlib",
    "rlcompleter",
    "runpy",
    "secrets",
    "shelve",
    "shutil",
    "signal",
    "site",
    "smtplib",
    "socket",
    "socketserver",
    "sqlite3",
    "ssl",
    "stat",
    "string",
    "stringprep",
    "subprocess",
    "symtable",
    "sysconfig",
    "tabnanny",
    "tempfile",
    "threading",
    "timeit",
    "token",
    "tokenize",
    "trace",
    "traceback",
    "tracemalloc",
    "tty",
    "types",
    "typing",
    "unittest",
    "urllib",
    "warnings",
    "wave",
    "weakref",
    "webbrowser",
    "xml",
    "xmlrpc",
    "zipapp",
    "zipimport",
    "zoneinfo",
]
HELD_OUT: Sequence[str] = [
    "bdb",
    "bisect",
    "calendar",
    "colorsys",
    "configparser",
    "difflib",
    "fileinput",
    "fractions",
    "graphlib",
    "heapq",
    "imaplib",
    "optparse",
    "plistlib",
    "sched",
    "selectors",
    "shlex",
    "statistics",
    "tarfile",
    "textwrap",
    "tomllib",
    "uuid",
    "wsgiref",
    "zipfile",
]


@register("corpus", "pydoc", oracle="formula: inspect.getsource of the module", source="the Python standard library")
class Pydoc(Corpus):
    """Modules of the standard library, a file a document. limit: stop after so many characters (whole files)."""

    split: Literal["train", "held_out"] = "train"
    limit: Count | None = None

    def documents(self) -> Iterator[str]:
        used = 0
        for path in module_files(TRAIN if self.split == "train" else HELD_OUT):
            text = read_text(path)
            if self.limit is not None and used + len(text) > self.limit and used:
                return
            used += len(text)
            if text:
                yield text


def module_files(names: Sequence[str]) -> Iterator[Path]:
    """The source files of modules and packages (tests left out), sorted within each. Raises DataError."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in names:
        package = root / name
        if package.is_dir():
            files = (p for p in package.rglob("*.py") if not {"test", "tests"} & set(p.relative_to(root).parts))
            yield from sorted(files, key=lambda p: p.relative_to(root).as_posix())
        elif (root / f"{name}.py").is_file():
            yield root / f"{name}.py"
        else:
            raise DataError(
                f"the standard library here has no source of {name!r}",
                where=str(root),
                remedy="use a Python 3.11-3.14 installed with its library's sources, or a corpus of your own",
            )
