from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kinds import KINDS, Place
from zoo import Zoo


@pytest.fixture(scope="session")
def made(zoo: Zoo, tokens: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a run of a kind, made once."""
    folder = tmp_path_factory.mktemp("kinds")

    def make(kind: str) -> Path:
        output = folder / kind.replace(" ", "-").replace(",", "")
        if not output.is_dir():
            KINDS[kind](Place(zoo, tokens, pictures, output))
        return output

    return make
