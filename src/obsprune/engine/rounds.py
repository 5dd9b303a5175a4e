"""I-OBS (Wu et al., NeurIPS 2024): rounds around any layer solver. One shot is the first; each further round takes new
calibration sequences, moves all weights of the sparse model toward the dense model's outputs, pruned weights too, and
projects them with the solver again, the mask free to change.

A round: (1) a fine-tuning pass over its sequences (engine/finetune.py), if it helps; (2) from there a step and a
projection for several step sizes (engine/steps.py); (3) the best of them by the divergence on held-out sequences. The
rounds end when so many of them in a row (`patience`) are no better than the best one, which is kept, or when one of
them leads to numbers that are not finite. What was measured: docs/methods.md, "Rounds".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from obsprune.engine.finetune import DECAY, RATES, Tuning, search
from obsprune.engine.inputs import NotFinite
from obsprune.engine.layerwise import Projection
from obsprune.engine.place import Committed, OnDisk, Place, Source, Store
from obsprune.engine.rundir import Event, RunDir
from obsprune.engine.steps import Candidate, Newton, Step
from obsprune.engine.teacher import Lesson, Score, teach
from obsprune.errors import ObspruneError
from obsprune.models.samples import Samples
from obsprune.progress import Progress, Silent

INFINITE = "the pruned model's logits are not finite; compute in a wider type (--dtype float32)"
NOWHERE = Score(math.inf, math.inf, 0.0)
"""Of a round that came to no weights: no better than any other."""
PROBE = 0.5
"""A learning rate is tried on this part of one pass over the sequences."""


def unscored(number: int, weights: Source) -> Event:
    """Of a round that is not evaluated."""
    return {}


@dataclass(frozen=True)
class Rounds:
    """All rounds after the first. tuning: None for none; judged_at_once, lesson_size: samples of one forward, of those
    held out and of a round's; patience: how many rounds in a row may be no better; evaluate: what a report should say
    of a round's iterate.
    """

    step: Step
    tuning: Tuning | None
    projection: Projection
    place: Place
    run: RunDir
    progress: Progress
    judged_at_once: int
    lesson_size: int
    patience: int = 1
    evaluate: Callable[[int, Source], Event] = unscored

    def __call__(self, further: Sequence[Samples], held: Samples, seconds: float) -> None:
        """Improves the one-shot result in `run` and commits the best iterate there.

        further: the samples of each round; held: those that judge; seconds: what one shot took. Rounds that the run
        directory knows are not done again.
        """
        judge = teach(self.place, held, self.judged_at_once)
        last = self.run.recorded("round") or self._first(judge, seconds)
        for number, samples in enumerate(further, 2):
            if last["round"] < number and self._goes_on(last["round"], last["heldout_kl"]):
                self.progress.line(describe(last, len(further) + 1, self._best["round"]))
                last = self._attempt(number, samples, judge, last)
        self.progress.line(describe(last, len(further) + 1, self._best["round"]))
        if not math.isfinite(last["heldout_kl"]):
            self.progress.notice(f"the rounds end with round {last['round']}: {last.get('ended', INFINITE)}")
        self._finish()

    @property
    def _best(self) -> Event:
        """What the journal says of the best round so far."""
        best = self.run.recorded("round", kept=True)
        assert best is not None
        return best

    def _goes_on(self, number: int, divergence: float) -> bool:
        """Whether another round follows this one: never where the logits are not finite."""
        return math.isfinite(divergence) and bool(number - self._best["round"] < self.patience)

    def _first(self, judge: Lesson, seconds: float) -> Event:
        score = judge.score(self._iterate(1))
        if math.isinf(score.kl):
            raise ObspruneError(INFINITE)
        return self._record(1, score, seconds, kept=True, **self.evaluate(1, self._iterate(1)))

    def _record(self, number: int, score: Score, seconds: float, **facts: Any) -> Event:
        told = self.place.model.kind.told(score.nll, score.agreement)
        values = {"heldout_kl": score.kl, "told": told, "seconds": seconds, **facts}
        return self.run.record("round", round=number, **values)

    def _iterate(self, number: int) -> Source:
        """The weights a round ended with."""
        return Committed(self.run) if number == 1 else self._folder(number)

    def _folder(self, number: int) -> OnDisk:
        return OnDisk(self.run.iterate(number), self.place.model.device)

    def _attempt(self, number: int, samples: Samples, judge: Lesson, last: Event) -> Event:
        """A round; one whose numbers grow too large for the dtype is no better than the others."""
        begin = time.perf_counter()
        try:
            return self._round(number, samples, judge, last)
        except NotFinite as error:
            facts: Event = {"kept": False, "step": 0.0, "rate": None, "moved": 0.0, "matrices": {}, "ended": str(error)}
            return self._record(number, NOWHERE, time.perf_counter() - begin, **facts)

    def _round(self, number: int, samples: Samples, judge: Lesson, last: Event) -> Event:
        begin = time.perf_counter()
        before = self._iterate(number - 1)
        lesson = teach(self.place, samples, self.lesson_size)
        point, rate = self._tuned(before, lesson, judge, last)
        found = self.step.candidates(point, lesson, self.projection, self.step.sizes(last.get("step")), self.progress)
        score, best = self._choose(found, judge)
        kept = score.kl < self._best["heldout_kl"]
        if kept or self._goes_on(number, score.kl):
            folder = self._folder(number)
            self.run.ranks.told(lambda: keep(best.weights, folder, self.place))
        facts = {
            "kept": kept,
            "step": best.size,
            "rate": rate,
            "moved": moved(before, best.weights, self.place),
            "matrices": {block: [asdict(result) for result in results] for block, results in best.matrices.items()},
        }
        seconds = time.perf_counter() - begin
        told = self.evaluate(number, best.weights) if math.isfinite(score.kl) else {}
        event = self._record(number, score, seconds, **facts, **told)
        self.run.forget({number, self._best["round"]})
        return event

    def _tuned(self, before: Source, lesson: Lesson, judge: Lesson, last: Event) -> tuple[Source, float | None]:
        """The point after fine-tuning and its learning rate; where it came from, and None, when that was better."""
        if self.tuning is None:
            return before, None
        shares, rate = self.tuning.shares(lesson), last.get("rate")
        if rate is None:
            part = shares[: max(1, int(PROBE * len(shares)) // self.tuning.passes)]
            self.progress.stage("learning rates", len(RATES))
            rate, _ = search(RATES, partial(self._try, before, lesson, judge, part))
        else:
            rate *= DECAY
        self.progress.stage("fine-tuning", len(shares))
        point, divergence = self._pass(before, lesson, judge, shares, rate, self.progress.step)
        return (point, rate) if divergence < last["heldout_kl"] else (before, None)

    def _try(self, before: Source, lesson: Lesson, judge: Lesson, part: Sequence[range], rate: float) -> float:
        divergence = self._pass(before, lesson, judge, part, rate)[1]
        self.progress.step(f"rate {rate:.2g}: held-out KL {divergence:.4f}")
        return divergence

    def _pass(
        self,
        before: Source,
        lesson: Lesson,
        judge: Lesson,
        shares: Sequence[range],
        rate: float,
        step: Callable[[], None] = lambda: None,
    ) -> tuple[Source, float]:
        """The point after a fine-tuning pass over some shares of a lesson, and how far it is, projected, from dense."""
        assert self.tuning is not None
        try:
            point = self.tuning.run(before, lesson, shares, rate, step)
            if self.tuning.masked:
                return point, judge.score(point).kl
            projected = Newton().candidates(point, lesson, self.projection, [0.0], Silent())
            return point, judge.score(projected[0].weights).kl
        except NotFinite:  # the rate was far too large: it is shown as infinitely bad, and another is taken
            return before, math.inf

    def _choose(self, found: Sequence[Candidate], judge: Lesson) -> tuple[Score, Candidate]:
        self.progress.stage("step sizes", len(found))
        scores = []
        for candidate in found:
            scores.append(judge.score(candidate.weights))
            self.progress.step(f"step {candidate.size:g}: held-out KL {scores[-1].kl:.4f}")
        return min(zip(scores, found, strict=True), key=lambda pair: pair[0].kl)

    def _finish(self) -> None:
        """Writes the best iterate over the shards of the first one."""
        best = self._best
        if best["round"] == 1:
            return
        weights, model = self._folder(best["round"]), self.place.model
        for index, block in enumerate(model.blocks):
            with self.place.at(index, weights):
                first = self.run.recorded("block", name=block.name)
                assert first is not None
                matrices = [self._with_target(first, result) for result in best["matrices"].get(block.name, [])]
                facts = {"coverage": first.get("coverage", [])}
                self.run.commit(block.name, block.tensors(), matrices, 0.0, **facts)

    def _with_target(self, first: Event, result: Event) -> Event:
        """What became of a matrix in the last round, with what its first round's target was."""
        before = next(matrix for matrix in first["matrices"] if matrix["name"] == result["name"])
        return result | {"correction": before["correction"], "residual": before["residual"]}


def keep(weights: Source, store: Store, place: Place) -> None:
    """Copies weights into a store that outlives the process."""
    for block in place.model.blocks:
        store.put(block, weights.get(block))


def moved(before: Source, after: Source, place: Place) -> float:
    """The share of weights that are zero in one and not in the other."""
    changed = total = 0
    for block in place.model.blocks:
        old, new = before.get(block), after.get(block)
        for name in (matrix.name for matrix in block.matrices):
            weight = new[name]
            changed += int(((old[name].to(weight.device) == 0) != (weight == 0)).sum())
            total += weight.numel()
    return changed / total


def spoken(told: dict[str, float]) -> str:
    """Scores by name, in a sentence."""
    return ", ".join(f"{name} {value:.3f}" for name, value in told.items())


def describe(event: Event, total: int, best: int) -> str:
    """One line about a round. best: the number of the best one so far."""
    scores = f"held-out KL {event['heldout_kl']:.4f}, {spoken(event['told'])}"
    facts = f"round {event['round']} of {total}: {scores}"
    if event["round"] > 1:
        rate = f", rate {event['rate']:.2g}" if event["rate"] else ""
        facts += f", step {event['step']:.2g}{rate}, {100 * event['moved']:.2f} % of the mask moved"
    worse = "" if event["kept"] else f"; no better than round {best}, which is kept"
    return f"{facts}, {event['seconds']:.1f} s{worse}"
