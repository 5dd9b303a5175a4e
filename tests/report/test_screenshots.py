"""The pictures in docs/: all that the script makes are there, small enough, shown and described; and it makes them."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path
from typing import Any

import pytest
from browser import launched
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.compile(r"!\[([^\]]*)\]\(pictures/([\w-]+)\.png\)")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "scripts/screenshots.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["screenshots"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_there_and_shown(script: Any) -> None:
    shown = {name: told for page in (ROOT / "docs").glob("*.md") for told, name in SHOWN.findall(page.read_text())}
    assert {path.stem for path in (ROOT / "docs/pictures").iterdir()} == set(script.SHOTS) == set(shown)
    assert all(len(told) > 20 for told in shown.values()), "each is described for those who do not see it"
    assert all("made-up" in shown[name] for name in shown if name.startswith("made-up"))
    for name in script.SHOTS:
        assert (ROOT / f"docs/pictures/{name}.png").stat().st_size <= script.LARGEST


def test_pictures_are_taken_of_what_was_asked(script: Any, tmp_path: Path) -> None:
    script.make_up(tmp_path / "made-up.html")
    shot = script.SHOTS["made-up-errors-dark"]
    with launched() as browser:
        picture = Image.open(io.BytesIO(script.small(script.photograph(browser, tmp_path / shot.page, shot))))
    assert picture.mode == "P" and 0.8 * shot.width * shot.scale < picture.width < shot.width * shot.scale
    red, green, blue = picture.convert("RGB").getpixel((0, picture.height - 1))
    assert max(red, green, blue) < 60, "it is dark"


def test_a_picture_that_is_too_large_is_refused(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LARGEST", 100)
    found = io.BytesIO()
    Image.effect_noise((90, 90), 50).save(found, "png")
    with pytest.raises(SystemExit, match="more than 100"):
        script.small(found.getvalue())
