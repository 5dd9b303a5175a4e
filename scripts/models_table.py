"""Writes docs/models.md: every architecture of the tests' zoo, tried."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    from models_table import SECTIONS, page, row
    from zoo import PICTURED, Zoo, pictures_in, tokens_in

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        zoo, tokens, pictures = Zoo(scratch / "zoo"), tokens_in(scratch), pictures_in(scratch)
        names = [name for families in SECTIONS.values() for name in families]
        rows = {name: row(zoo, name, pictures if name in PICTURED else tokens, scratch / name) for name in names}
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs/models.md").write_text(page(rows))


if __name__ == "__main__":
    main()
