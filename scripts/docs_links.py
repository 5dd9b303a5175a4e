"""A hook of mkdocs: links from pages to files of the repository.

They are written `../recipes/README.md`, which is right where the repository is read. In the site such a link goes to
the repository, at `repo_url` or else on this machine. The file must be there.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTWARD = re.compile(r"\]\(\.\./([^)#\s]+)")
log = logging.getLogger("mkdocs.hooks.docs_links")  # a warning there fails a strict build


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its links out of docs/ made absolute."""
    del files
    top = f"{config.repo_url.rstrip('/')}/blob/main" if config.repo_url else ROOT.as_uri()

    def absolute(link: re.Match[str]) -> str:
        if not (ROOT / link[1]).exists():
            log.warning("%s links to ../%s, which is not there", page.file.src_uri, link[1])
        return f"]({top}/{link[1]}"

    return OUTWARD.sub(absolute, markdown)
