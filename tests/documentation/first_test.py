"""A plug-in of pytest that keeps the first test that a command line selects: the suite itself runs elsewhere."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Never a test of the documentation, which would run itself."""
    others = [item for item in items if "documentation" not in item.nodeid]
    config.hook.pytest_deselected(items=[item for item in items if item not in others[:1]])
    items[:] = others[:1]
