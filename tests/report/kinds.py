"""One finished run of each kind that a report can be of, small enough for tests: {kind: what makes it}."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import together
from zoo import Zoo

from obsprune import pipeline
from obsprune.engine.distributed import processes
from obsprune.finetune_pipeline import finetune
from obsprune.finetune_recipe import make_finetuning
from obsprune.progress import Silent
from obsprune.ranks import ALONE, Ranks
from obsprune.recipe import make_recipe
from obsprune.train_pipeline import train_prune
from obsprune.training_recipe import make_training

Tree = dict[str, Any]
ROUNDS: Tree = {"iters": 2, "target": "stream", "rounds": {"steps": 2, "scored": True},
                "matching": {"passes": 1, "steps": 2}}  # fmt: skip

LATER = r"layer\.[2-9]"
"""Of a model in which each filter is a matrix."""


@dataclass(frozen=True)
class Place:
    """Where runs find models and data, and where they go."""

    zoo: Zoo
    tokens: Path
    pictures: Path
    output: Path

    def text(self, family: str = "llama", ranks: Ranks = ALONE, **settings: Any) -> None:
        data = {"dataset": str(self.tokens), "nsamples": 6, "seqlen": 32, "heldout": 4}
        self._prune(family, data, ranks, settings)

    def image(self, family: str = "vit", **settings: Any) -> None:
        self._prune(family, {"dataset": f"imagenet={self.pictures}", "nsamples": 8, "heldout": 8}, ALONE, settings)

    def _prune(self, family: str, data: Tree, ranks: Ranks, settings: Tree) -> None:
        model = {"name": str(self.zoo(family))} | settings.pop("model", {})
        recipe = make_recipe({"model": model, "data": data, "evaluation": ["heldout"]}, settings)
        pipeline.prune(recipe, self.output, Silent(), command="obsprune prune it", ranks=ranks)


def _resumed(place: Place) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(pipeline, "evaluate_result", lambda *_: 1 / 0)
        place.text()
    place.text()


def _several(place: Place) -> None:
    def work() -> None:
        with processes() as ranks:
            place.text(ranks=ranks)

    ended = together(2, work, place.output.parent / "said")
    assert [one.code for one in ended] == [0, 0], ended


def _trained(place: Place) -> None:
    data = {"dataset": f"imagenet={place.pictures}", "nsamples": 8, "heldout": 8}
    training = {"steps": 2, "epochs": 1, "lr": 1e-3, "batch_size": 6}
    common = {"model": {"name": str(place.zoo("vit"))}, "data": data, "sparsity": 0.6, "evaluation": ["heldout"]}
    train_prune(make_training(common | {"training": training}), place.output, Silent())


def _tuned(place: Place, **tuning: Any) -> None:
    sparse = Place(place.zoo, place.tokens, place.pictures, place.output.parent / f"{place.output.name}-sparse")
    sparse.text(solver={"name": "magnitude"}, evaluation=["none"])
    data = {"dataset": str(place.tokens), "seqlen": 32, "heldout": 4}
    common = {"model": {"name": str(sparse.output)}, "data": data, "evaluation": ["heldout"]}
    part = {"steps": 4, "batch_size": 4, "lr": 3e-3, "every": 2} | tuning
    finetune(make_finetuning(common, {"tuning": part}), place.output, Silent())


KINDS: dict[str, Callable[[Place], None]] = {
    "one shot": lambda place: place.text(),
    "rounds": lambda place: place.text(**ROUNDS),
    "packed": lambda place: place.text(format="packed", pattern="2:4"),
    "shares": lambda place: place.text(sparsity=0.7, allocation={"rules": ["owl"]}),
    "experts": lambda place: place.text("qwen2_moe"),
    "experts left dense": lambda place: place.text("qwen2_moe", experts={"starved": "skip", "fewest": 50}),
    "not evaluated": lambda place: place.text(evaluation=["none"], solver={"name": "magnitude"}),
    "classifier": lambda place: place.image(**ROUNDS),
    "filters": lambda place: place.image("mobilenet_v2", model={"depthwise": True}, sparsity=0.3, skip=[LATER]),
    "resumed": _resumed,
    "several processes": _several,
    "train-prune": _trained,
    "finetune": _tuned,
    "finetune, distilled": lambda place: _tuned(place, teacher=str(place.zoo("llama"))),
}
