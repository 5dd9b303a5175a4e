"""Calibration and held-out samples, drawn from a source with a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from obsprune.errors import InputError
from obsprune.models.samples import Samples, Source


@dataclass(frozen=True)
class Draw:
    """Calibration and held-out samples, disjoint, with what a report says about them.

    further: the samples of the second and every later round, as many each as `calibration`.
    """

    calibration: Samples
    heldout: Samples
    further: list[Samples]
    facts: dict[str, Any]


def draw(source: Source, nsamples: int, heldout: int, seed: int, rounds: int = 1) -> Draw:
    """`nsamples` calibration samples and up to `heldout` others, drawn with the seed; as many again a further round.

    Held-out ones are what remains when there are too few for both; they are in no round. Rounds get samples that no
    round before them had, and when those run out, reshuffled ones. Raises InputError when calibration itself is short.
    """
    generator = torch.Generator().manual_seed(seed)
    found = source.sample(nsamples + heldout, generator, (rounds - 1) * nsamples)
    if len(found) < nsamples:
        raise InputError(f"{source.name} gives {len(found)} {found.noun} and {nsamples} are asked for; {found.remedy}")
    order = list(range(len(found)))
    calibration, held = found.take(order[:nsamples]), found.take(order[nsamples : nsamples + heldout])
    pool = order[:nsamples] + order[nsamples + heldout :]
    chosen = [[pool[place] for place in places] for places in _chosen(len(pool), nsamples, rounds, generator)]
    further = [found.take(indices) for indices in chosen[1:]]
    facts: dict[str, Any] = {
        "dataset": source.name,
        "unit": found.unit,
        **calibration.facts(),
        "heldout": len(held),
        "sha256": calibration.content_hash(),
        "heldout_sha256": held.content_hash(),
    }
    if further:
        facts["rounds"] = {
            "seen": len({index for indices in chosen for index in indices}),
            "fresh": [number * nsamples + nsamples <= len(pool) for number in range(rounds)],
            "sha256": [samples.content_hash() for samples in further],
        }
    return Draw(calibration, held, further, facts)


def _chosen(count: int, nsamples: int, rounds: int, generator: torch.Generator) -> list[list[int]]:
    """Which of `count` samples each round gets, the first too: the next ones; reshuffled ones when none are left."""
    parts = [list(range(number * nsamples, min((number + 1) * nsamples, count))) for number in range(rounds)]
    return [
        part if len(part) == nsamples else torch.randperm(count, generator=generator)[:nsamples].tolist()
        for part in parts
    ]
