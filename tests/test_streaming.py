"""Activations on disk change no byte of a result, and memory does not grow with the depth of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from anonymous import MB, measured
from zoo import Zoo, tokens_in

from obsprune.errors import InputError
from obsprune.models import activations
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe

SCRIPTS = Path(__file__).parents[1] / "scripts"
MORE = {"matching": {"passes": 2, "steps": 2}, "iters": 2, "rounds": {"steps": 2}}


@pytest.mark.parametrize("settings", [{"target": "own"}, {"target": "stream", **MORE}], ids=["one", "two"])
def test_where_activations_live_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    monkeypatch.setattr(activations, "LEAST", 1)
    model, tokens, puts = Zoo(tmp_path)("llama"), tokens_in(tmp_path), list[int]()
    room = activations.InFiles._room
    monkeypatch.setattr(activations.InFiles, "_room", lambda self, size: puts.append(size) or room(self, size))
    data = {"dataset": str(tokens), "nsamples": 4, "heldout": 2}
    for where in ("device", "disk"):
        engine = {"activations": where, "batch_size": 1}
        recipe = make_recipe({"model": {"name": str(model)}, "data": data, "engine": engine}, settings)
        prune(recipe, tmp_path / where, Silent())
        assert bool(puts) == (where == "disk")
    for path in (tmp_path / "device").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "disk" / path.name).read_bytes()


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(InputError, match="--activations disc; did you mean disk"):
        make_recipe({"engine": {"activations": "disc"}})


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from make_random_model import make

    growth = {}
    for gigabytes in (0.05, 0.15):
        model = tmp_path / f"{gigabytes}"
        depth = make(model, gigabytes, 256, "float32", 12, 128)
        words = [
            "prune",
            str(model),
            "--dataset",
            f"{model}/tokens.safetensors",
            "--nsamples",
            "4",
            "--solver",
            "wanda",
        ]
        more = ["--eval", "none", "--activations", "disk", "-q", "-o", f"{model}-out"]
        growth[depth] = measured([*words, *more], tmp_path, at_once=2**16).growth / MB
    (shallow, little), (deep, much) = sorted(growth.items())
    assert deep >= 2.5 * shallow
    assert abs(much - little) < 8, growth  # of 95 MiB more weights
