"""Whether a tag may be published: python scripts/check_release.py v0.1.0

The version of the package is that of the tag, and the changelog begins with it and the day of the release.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def flaws(tag: str, package: str, changelog: str) -> list[str]:
    """What is wrong, a sentence each. package, changelog: the texts of __init__.py and CHANGELOG.md."""
    (version,) = re.findall(r'^__version__ = "(.+)"$', package, flags=re.MULTILINE)
    heading = re.findall(r"^## (.+)$", changelog, flags=re.MULTILINE)[0]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and __version__ is {version}: v{version} is expected")
    if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", heading):
        found.append(f"the changelog begins with '{heading}': '{version} (YEAR-MONTH-DAY)' is expected")
    return found


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("src/obsprune/__init__.py", "CHANGELOG.md")]
    sys.exit("\n".join(flaws(sys.argv[1], *texts)) or None)
