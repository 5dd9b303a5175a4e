"""The pictures of docs/report.md and docs/comparing.md: reports in a real browser, wide and narrow, light and dark.

    python scripts/screenshots.py [--runs FOLDER] [NAME…]   # needs pip install '.[test]' and Chromium

The demo model is pruned for them in a temporary directory, a few times; the heat maps are of the made-up report of the
tests (224 matrices, as many as Llama-2-7B has). With --runs the runs stay in a folder, and those that are there already
are not made again.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs/pictures"
COLOURS = 224
"""Of a picture: pages have few, and the file is a quarter as large."""
LARGEST = 300_000
"""Bytes of a picture."""
sys.path.insert(0, str(ROOT / "tests/report"))

RUNS = {
    "rounds-60": ["--sparsity", "0.6", "--iters", "4"],
    "one-shot-60": ["--sparsity", "0.6"],
    "sparsegpt-60": ["--sparsity", "0.6", "--solver", "sparsegpt"],
    "one-shot-50": ["--sparsity", "0.5"],
    "rounds-70": ["--sparsity", "0.7", "--iters", "4"],
    "packed-2of4": ["--pattern", "2:4", "--format", "packed"],
}
"""Directory: how the demo model is pruned into it. The first one's own report is shown."""


@dataclass(frozen=True)
class Shot:
    """A picture. page: of which file; width, height: of the window; part: what alone is shown, a selector."""

    page: str
    width: int
    scheme: str
    height: int = 2000
    part: str | None = None
    scale: float = 1.5


ERRORS = "#matrices .figures figure:nth-child(2)"
SHOTS = {
    "report": Shot("report.html", 1180, "light", 1370),
    "report-dark": Shot("report.html", 400, "dark", part="#rounds"),
    "made-up-errors": Shot("made-up.html", 1180, "light", part=ERRORS),
    "made-up-errors-dark": Shot("made-up.html", 400, "dark", part=ERRORS),
    "comparison": Shot("comparison.html", 1180, "light", 1415),
    "comparison-dark": Shot("comparison.html", 400, "dark", 1500),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder for the runs, instead of a temporary one")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHOTS)}")
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in SHOTS]
    if unknown:
        parser.error(f"there is no picture {unknown[0]}; known: {', '.join(SHOTS)}")
    shots = {name: SHOTS[name] for name in asked.names or SHOTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_pages(folder.resolve(), {shot.page for shot in shots.values()})
        take(folder.resolve(), shots, PICTURES)


def make_pages(folder: Path, pages: set[str]) -> None:
    """Prunes what the pages are about."""
    if "made-up.html" in pages:
        make_up(folder / "made-up.html")
    shutil.copy(ROOT / "src/obsprune/demo/evaluation.txt", folder / "stories.txt")
    runs = list(RUNS) if "comparison.html" in pages else list(RUNS)[: "report.html" in pages]
    for name in [name for name in runs if not (folder / name / "report.json").is_file()]:
        obsprune(
            folder, "prune", "demo", *RUNS[name], "--eval", "heldout", "--eval", "text=stories.txt", "-o", name, "-q"
        )
    for page, shown in (("report.html", runs[:1]), ("comparison.html", runs)):
        if page in pages:
            obsprune(folder, "report", *shown, "-o", page, "-q")


def make_up(page: Path) -> None:
    from synthetic import synthetic_report

    from obsprune.report.page import make_page

    page.write_text(make_page(synthetic_report()), encoding="utf-8")


def obsprune(folder: Path, *words: str) -> None:
    print("obsprune", *words, flush=True)
    subprocess.run([sys.executable, "-m", "obsprune", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def take(pages: Path, shots: dict[str, Shot], pictures: Path) -> None:
    """Every picture as NAME.png."""
    from browser import launched

    pictures.mkdir(exist_ok=True)
    with launched() as browser:
        for name, shot in shots.items():
            file = pictures / f"{name}.png"
            file.write_bytes(small(photograph(browser, pages / shot.page, shot)))
            print(f"{file.relative_to(ROOT)}  {file.stat().st_size:,} bytes")


def photograph(browser: Any, page: Path, shot: Shot) -> bytes:
    window = {"width": shot.width, "height": shot.height}
    context = browser.new_context(viewport=window, color_scheme=shot.scheme, device_scale_factor=shot.scale)
    try:
        view = context.new_page()
        view.goto(page.as_uri())
        taken: bytes = view.locator(shot.part).screenshot() if shot.part else view.screenshot()
        return taken
    finally:
        context.close()


def small(picture: bytes) -> bytes:
    """The same in few colours. Raises SystemExit when that is still too large for a repository."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    found = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(found, "png", optimize=True)
    if found.tell() > LARGEST:
        sys.exit(f"a picture has {found.tell():,} bytes, more than {LARGEST:,}: show less of the page")
    return found.getvalue()


if __name__ == "__main__":
    main()
