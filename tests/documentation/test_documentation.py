"""Whatever the documentation prints runs; `python -m tests.documentation` lists every command and its outcome."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from tests.documentation.checkout import PLACEHOLDERS, Page, Session, run_source, session, with_placeholders
from tests.documentation.commands import ROOT, Snippet, comments, of_markdown, of_text
from tests.documentation.sources import help_of, names, settings, snippets
from tests.documentation.tiny import check_settings

PAGE = """# A page
Prose with `a span`, `python -m lkda.thing
--option` and `pytest`; time = space.

    python scripts/train.py seed=1 \\
      data=files     # a comment, then pip install 'lkda[eval]'
    for x in a b; do
      python scripts/evaluate.py ckpt=$x
    done
    model = lkda.load("x")

1. A list
   `make test ARGS="-k x"`

    S_t = a S_{t-1} + b        o = scale q

```python
import lkda
```

```yaml
python: [not, a, command]
```

~~~bash
$ frobnicate --all
~~~

```console
$ echo hello
hello
```
"""


def test_commands_are_found_by_what_they_look_like() -> None:
    found = [(snippet.line, snippet.language, snippet.text) for snippet in of_markdown("page", PAGE)]
    assert found == [
        (2, "shell", "python -m lkda.thing --option"),
        (5, "shell", "python scripts/train.py seed=1 \\\n  data=files     # a comment, then pip install 'lkda[eval]'"),
        (5, "shell", "pip install 'lkda[eval]'"),
        (7, "shell", "for x in a b; do\n  python scripts/evaluate.py ckpt=$x\ndone"),
        (10, "python", 'model = lkda.load("x")'),
        (13, "shell", 'make test ARGS="-k x"'),
        (18, "python", "import lkda"),
        (26, "shell", "frobnicate --all"),
        (30, "shell", "echo hello"),
    ]


def test_a_line_among_commands_that_is_neither_command_nor_python_is_not_passed_over() -> None:
    found = of_markdown("page", "    make test\n    pyhton scripts/train.py\n")
    assert [(snippet.language, snippet.text) for snippet in found] == [
        ("shell", "make test"),
        ("unknown", "pyhton scripts/train.py"),
    ]


def test_commands_are_found_in_comments_and_help_texts() -> None:
    yaml = """# What: python scripts/train.py debug=fast.
#   run   python scripts/train.py a=1 \\
#           b=[2]
#   do    for r in x/[0-9]*; do
#           python scripts/evaluate.py ckpt=$r; done
a: 1  # as `python scripts/export.py ckpt=PATH out=DIR [format=lkda|hf] [dtype=...]` writes
"""
    assert [snippet.text for snippet in of_text("yaml", comments(yaml))] == [
        "python scripts/train.py debug=fast",
        "python scripts/train.py a=1 \\\nb=[2]",
        "for r in x/[0-9]*; do\npython scripts/evaluate.py ckpt=$r; done",
        "python scripts/export.py ckpt=PATH out=DIR",
    ]
    line = "  python scripts/train.py init_from=DIR ...      python scripts/evaluate.py ckpt=DIR   measures it"
    assert [snippet.text for snippet in of_text("help", [(1, line)])] == [
        "python scripts/train.py init_from=DIR",
        "python scripts/evaluate.py ckpt=DIR",
    ]


def test_a_placeholder_has_a_meaning_or_is_named() -> None:
    command = "OMP_NUM_THREADS=1 python x.py ckpt=RUN 'a=RUNS/*/b.json' for T in 1; do $T"
    replaced = command.replace("RUNS", PLACEHOLDERS["RUNS"]).replace("=RUN ", f"={PLACEHOLDERS['RUN']} ")
    assert with_placeholders(command) == (replaced, [])
    assert with_placeholders("python x.py ckpt=WHATEVER")[1] == ["WHATEVER"]


def test_every_placeholder_of_a_page_has_a_meaning() -> None:
    pages = [name for name in names() if not name.endswith(" --help")]
    assert {
        word for page in pages for snippet in snippets(page) for word in with_placeholders(snippet.text)[1]
    } == set()


def test_the_pages_and_every_script_are_covered() -> None:
    found = names()
    assert {"README.md", "CONTRIBUTING.md", "docs/guides/exporting.md", "docs/results/README.md"} <= set(found)
    assert {"configs/experiment/long_context.yaml", "lkda/report/redraw.py"} <= set(found)
    assert {f"scripts/{path.name} --help" for path in (ROOT / "scripts").glob("*.py")} <= set(found)


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE)
    assert set(re.findall(r"^# make ([\w-]+) ", text, re.MULTILINE)) == set(targets.split()) - {"help"}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path.name, marks=pytest.mark.slow if path.name == "train.py" else pytest.mark.long)
        for path in sorted((ROOT / "scripts").glob("*.py"))
    ],
)
def test_every_setting_of_a_help_text_exists(script: str) -> None:
    found = settings(help_of(f"scripts/{script} --help"))
    assert found or script in ("compare.py", "prepare_data.py")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for setting in found:
            compose(Path(script).stem, overrides=[setting], return_hydra_config=True)


@pytest.fixture(scope="session")
def documentation() -> Iterator[Session]:
    with session() as made:
        yield made


# What a reader meets first, and one page of each other kind: CI runs these. It has no time for the others, such as the
# guides with sweeps, benchmarks and prepared corpora, and the notes of measurements. `make test-long` runs them.
IN_CI = (
    *("README.md", "docs/guides/exporting.md"),
    *("docs/guides/adding_a_mixer.md", "docs/guides/other_models.md", "docs/reference/", "examples/"),
    *("docs/results/notes.md", "lkda/report/readme.py"),
)


@pytest.mark.slow
def test_the_settings_of_the_other_guides_exist() -> None:
    """CI composes their configurations and does not run them."""
    guides = [name for name in names() if name.startswith(("CONTRIBUTING.md", "docs/guides/", "scripts/"))]
    others = [snippet for name in guides if not name.startswith(IN_CI) for snippet in snippets(name)]
    found = [command for snippet in others if (command := _of_a_script(snippet)) is not None]
    assert len(found) > 30
    # Of lines that differ in numbers alone, one.
    different = {(script, *(re.sub(r"\d+", "1", word) for word in words)): words for script, words in found}
    for (script, *_), words in different.items():
        check_settings(script, words, ROOT / "configs")
    with pytest.raises(ConfigCompositionException):
        check_settings("train", ["model.no_such=1"], ROOT / "configs")


def _of_a_script(snippet: Snippet) -> tuple[str, list[str]] | None:
    """The name and the settings of a line that calls one of scripts/ and nothing else."""
    line, _ = with_placeholders(re.sub(r"#.*", "", snippet.text.replace("\\\n", " ")))
    match = re.fullmatch(r"(?:[A-Z_]+=\S+ )*python scripts/(\w+)\.py (?!.*--)([^$|&;\n]*)", line.strip())
    return (match[1], shlex.split(match[2])) if match else None


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name.startswith(IN_CI) else pytest.mark.long) for name in names()],
)
def test_what_is_documented_runs(name: str, documentation: Session) -> None:
    """In order, in one checkout. Every failure is shown, with what the command printed."""
    failed = []
    for result in run_source(name, documentation):
        print(result)
        if result.outcome == "failed":
            failed.append(f"{result}\n{result.output[-3000:]}")
    assert not failed, "\n\n".join(failed)


HUB = """from lkda.data.text.hub import HubDataModule
for streaming in (True, False):
    data = HubDataModule(
        name="roneneldan/TinyStories", streaming=streaming, max_documents=90,
        context=32, batch_size=2, vocab_size=300, seed=1, cache_dir=f"hub_{streaming}",
    )
    data.prepare()
    assert data.val_batches
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "text", "outcome"),
    [
        ("shell", "python scripts/train.py debug=fast", "ran"),
        ("python", HUB, "ran"),
        ("shell", "python scripts/train.py trainer=gpu", "composed"),
        ("shell", "python scripts/train.py trainer=gpu no_such=1", "failed"),
        ("shell", "python scripts/train.py data=no_such", "failed"),
        ("shell", "python scripts/train.py seed=x | cat", "failed"),
        ("shell", "python scripts/train.py -m seed=1 mixer=kda,simplified mixer.kda.conv_width=-1", "failed"),
        ("shell", "python scripts/no_such.py", "failed"),
        (
            "shell",
            "python scripts/evaluate.py ckpt=lkda/nothing",
            "failed",
        ),  # the page's own folder: nothing is laid there
        ("shell", "python -m lkda.bench.state_error --no-such", "failed"),
        ("shell", "pip install -e '.[no_such]'", "failed"),
        ("shell", "make no_such", "failed"),
        ("shell", "python x.py ckpt=WHATEVER", "failed"),
        ("python", "import lkda\nlkda.no_such", "failed"),
        ("unknown", "pyhton scripts/train.py", "failed"),
    ],
)
def test_what_does_not_run_fails(language: str, text: str, outcome: str, documentation: Session) -> None:
    page = Page("wrong", documentation)
    try:
        result = page.run(Snippet("wrong", 1, text, language))
    finally:
        page.remove()
    assert result.outcome == outcome, result.output
