"""Where a dense checkpoint came from, and what it says of its licence: for the card of its sparse copy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

from obsprune.errors import InputError
from obsprune.models.caution import is_file, read_json
from obsprune.models.checkpoint import REPORT

CARD = "README.md"
LONGEST = 2**20
"""Bytes of a card; longer ones are not read."""
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
"""Of a licence, as the hub writes them: apache-2.0, llama2, other."""
ID, REVISION = re.compile(r"[\w.-]+/[\w.-]+"), re.compile(r"[0-9a-f]{40}")
SNAPSHOT = re.compile(r".*/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})", re.DOTALL)
"""Where the cache of the Hugging Face hub keeps a version of a model."""


def origin(directory: Path) -> dict[str, str] | None:
    """{id, revision} on the hub of a checkpoint that was downloaded, or of the one that a result of obsprune was made
    of; nothing is known of other local ones.
    """
    found = SNAPSHOT.fullmatch(str(directory.absolute()))
    return {"id": f"{found[1]}/{found[2]}", "revision": found[3]} if found else _told(directory / REPORT)


def _told(report: Path) -> dict[str, str] | None:
    """What a result's report says of the dense model, where it can be what it should."""
    try:
        base = read_json(report)["model"]["base"]
        known = ID.fullmatch(base["id"]) and REVISION.fullmatch(base["revision"])
    except (InputError, LookupError, TypeError):
        return None
    return {"id": base["id"], "revision": base["revision"]} if known else None


def licence(directory: Path, config: Any) -> dict[str, str]:
    """What a checkpoint's own card says of its licence, or else its config: license, and where they are there
    license_name and license_link; nothing is guessed.
    """
    told = _front_matter(directory / CARD)
    if not _is_licence(told.get("license")):
        told = {"license": getattr(config, "license", None)}
    if not _is_licence(told["license"]):
        return {}
    texts = {key: told.get(key) for key in ("license", "license_name", "license_link")}
    return {key: text for key, text in texts.items() if isinstance(text, str) and len(text) < 200}


def _is_licence(value: Any) -> bool:
    return isinstance(value, str) and IDENTIFIER.fullmatch(value) is not None


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the beginning of a card; none of one that is no YAML."""
    if not is_file(path) or path.stat().st_size > LONGEST:
        return {}
    try:
        found = metadata_load(path)
    except Exception:  # what is wrong with somebody's card is not our matter, and YAML fails in many ways
        return {}
    return found if isinstance(found, dict) else {}
