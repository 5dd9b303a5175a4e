"""What the shards of a result say of themselves in their metadata, for whoever finds one without its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from obsprune import __version__

ENTRY = "obsprune-pruning"


def signature(recipe: Mapping[str, Any]) -> dict[str, str]:
    """{ENTRY: JSON with the version of obsprune, and the sparsity, pattern and method that were asked for}; what was
    reached is known only when the last shard is written.
    """
    method = recipe.get("training", {}).get("method") or recipe.get("solver", {}).get("name")
    pattern = recipe.get("pattern", "unstructured")
    told = {"version": __version__, "sparsity": recipe.get("sparsity"), "pattern": pattern, "method": method}
    return {ENTRY: json.dumps(told)}
