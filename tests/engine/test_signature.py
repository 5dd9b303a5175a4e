"""What the shards of a result say of themselves; the same bytes each time, though safetensors shuffles its metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from zoo import Zoo, tokens_in

from obsprune import __version__
from obsprune.engine.signature import ENTRY
from obsprune.models.checkpoint import write_shard
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe

FACTS = {"z": 'quoted "text" \\ \n\t\x01\x7f', "obsprune-pruning": json.dumps({"a": "é ∑"}), "a": ""}


def test_many_facts_have_one_order(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5.0), "a é": torch.ones(2, 3, dtype=torch.bfloat16), "empty": torch.ones(0)}
    for number in range(20):
        write_shard(tmp_path / str(number), tensors, FACTS)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == {"format": "pt", **FACTS}
    found = load_file(tmp_path / "0")
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("rules", [[], ["owl"]], ids=["uniform", "from a trial"])
def test_every_shard_of_a_result_is_signed(zoo: Zoo, tmp_path: Path, rules: list[str]) -> None:
    data = {"dataset": str(tokens_in(tmp_path)), "nsamples": 2, "heldout": 2}
    tree = {"model": {"name": str(zoo("llama"))}, "data": data, "evaluation": ["none"], "sparsity": 0.6}
    prune(make_recipe(tree, {"allocation": {"rules": rules}}), tmp_path / "out", Silent())
    told = {"version": __version__, "sparsity": 0.6, "pattern": "unstructured", "method": "sparsegpt"}
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) >= 3
    for path in shards:
        with safe_open(path, "pt") as file:
            found = file.metadata()
        assert found.keys() == {"format", ENTRY} and found["format"] == "pt" and json.loads(found[ENTRY]) == told
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((zoo("llama") / "config.json").read_text())
