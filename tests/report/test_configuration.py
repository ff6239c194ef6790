"""The reference of all settings is that of configs/, and leaves none without a meaning."""

from __future__ import annotations

from pathlib import Path

from lkda.report.configuration import Setting, files, page, read_config

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    committed = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert committed == page(ROOT / "configs"), "python -m lkda.report.configuration writes it"


def test_every_setting_has_a_comment() -> None:
    presets = ("experiment=", "debug=")
    settings = [(title, each) for title, file in files(ROOT / "configs") for each in file.settings]
    explained = {(title, each.key) for title, each in settings if each.meaning}
    missing = [(title, each.key) for title, each in settings if not each.meaning and not title.startswith(presets)]
    # The rate of each size of model is explained once, with all of them.
    assert [(title, key) for title, key in missing if (title, key.rpartition(".")[0]) not in explained] == []


def test_keys_comments_and_defaults_are_read(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        "# @package _global_\n# What it is: a thing.\n#   run   a command\ndefaults:\n  - two\n  - _self_\n"
        "_target_: some.class\n"
        "a: 1            # the first, 1 | 2\n"
        "# of several\n# lines\nb:\n  c: [x, y]     # a list\n  d: {e: 1}\n"
        "f:\n  - {g: 1}\n  - {g: 2}\n"
        "hydra:\n  run: .\n"
    )
    found = read_config(tmp_path / "one.yaml", "group.")
    assert found.about == "What it is: a thing."
    assert found.starts_from == ["two"]
    assert found.settings == [
        Setting("group.a", "1", "the first, 1 | 2"),
        Setting("group.b", "", "of several lines"),
        Setting("group.b.c", "[x, y]", "a list"),
        Setting("group.b.d", "{e: 1}", ""),
        Setting("group.f", "2 entries, see the file", ""),
    ]
