"""What the tests of pages share: one browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browser import Browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; skips where there is none."""
    from browser import MISSING, chromium

    if MISSING:
        pytest.skip(MISSING)
    with chromium(tmp_path_factory.mktemp("downloads")) as browser:
        yield browser
