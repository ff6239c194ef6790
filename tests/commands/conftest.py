"""Scripts are run inside the test's process: starting a new one costs seconds."""

import os
from collections.abc import Iterator

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from tests.commands.bad_places import places as places  # fixtures
from tests.report.conftest import few_pixels as few_pixels
from tests.report.conftest import one_bundle as one_bundle
from tests.report.tradeoff.conftest import bench as bench


@pytest.fixture(autouse=True)
def fresh_hydra() -> Iterator[None]:
    """Hydra keeps global state that a script of its own process would not find."""
    HydraConfig.instance().cfg = None
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    for name in ("HYDRA_FULL_ERROR", "LKDA_SETS_HYDRA_FULL_ERROR"):
        os.environ.pop(name, None)
