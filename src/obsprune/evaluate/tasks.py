"""From a task's name to the task: what it is made of, and for which kind of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from obsprune.errors import InputError, nearest
from obsprune.evaluate.harness import harness_task, mmlu_task
from obsprune.evaluate.imagenet import imagenet_task
from obsprune.evaluate.perplexity import Perplexity
from obsprune.evaluate.task import Task
from obsprune.models.images import ImageSamples, ImageSource, Labels
from obsprune.models.kinds import Wish
from obsprune.models.load import Model
from obsprune.models.samples import Samples
from obsprune.models.text import Corpus, TokenSamples

TEXTS = {
    "wikitext2": "test split, lines joined by a blank line",
    "c4": "first test shard, 1,100 documents joined by a space",
}
KNOWN = ("heldout", "text=PATH", *TEXTS, "imagenet=PATH", "mmlu", "mmlu=PATH")
C4_ROWS = 256
"""Rows of the published C4 protocol."""


@dataclass(frozen=True)
class Setting:
    """What tasks are made for. heldout: the samples a run kept apart, and how; limit: the first items only (for MMLU of
    each subject); num_fewshot: solved examples before a question, where it is not the task's own number.
    """

    model: Model
    seqlen: int
    heldout: Callable[[], tuple[Samples, str]]
    limit: int | None = None
    num_fewshot: int | None = None


def check_name(name: str) -> None:
    """Raises InputError for a task nobody knows."""
    head, equals, rest = name.partition("=")
    if head in ("text", "imagenet") and not rest:
        raise InputError(f"task '{name}' names no file; give {head}=PATH")
    known = head in MAKERS and (not equals or head == "mmlu")
    if not known and head not in ("text", "imagenet") and (equals or find_spec("lm_eval") is None):
        raise InputError(
            f"unknown task '{name}'; {nearest(name, KNOWN)}; with pip install 'obsprune[eval]' every task of lm_eval"
        )


def make_task(name: str, setting: Setting) -> Task:
    """Raises InputError for an unknown task, or one that is for another kind of model."""
    check_name(name)
    head = name.partition("=")[0]
    suits, make = MAKERS.get(head, ("text", _harness))
    model = setting.model
    if suits not in ("any", model.kind.reads):
        raise InputError(
            f"task {name} consists of {suits} and a {model.config.model_type} model reads {model.kind.reads}"
        )
    return make(name, setting)


def _heldout(name: str, setting: Setting) -> Task:
    samples, rule = setting.heldout()
    if not len(samples):
        raise InputError("nothing was kept apart from the calibration data; set data.heldout above 0")
    return OF_SAMPLES[samples.unit](name, samples, rule, setting)


def _text(name: str, setting: Setting) -> Task:
    source, _ = setting.model.open(Wish(name.removeprefix("text="), setting.seqlen, split="test"))
    assert isinstance(source, Corpus)
    samples = source.every()
    first = samples.take(range(min(len(samples), C4_ROWS))) if name == "c4" else samples
    return _rows(name, first, TEXTS.get(name, source.joined), setting)


def _rows(name: str, samples: Samples, joined: str, setting: Setting) -> Task:
    assert isinstance(samples, TokenSamples)
    chosen = samples.take(range(min(len(samples), setting.limit or len(samples))))
    protocol = {
        "corpus": name.removeprefix("text="),
        "join": joined,
        "stride": chosen.positions,
        **chosen.facts(),
        "first_token": int(chosen.ids[0, 0]),
        "sha256": chosen.content_hash(),
    }
    return Perplexity(name, chosen, protocol)


def _imagenet(name: str, setting: Setting) -> Task:
    source, _ = setting.model.open(Wish(name, setting.seqlen, split="validation"))
    assert isinstance(source, ImageSource)
    return imagenet_task(name, source, Labels(setting.model.config), setting.limit)


def _images(name: str, samples: Samples, rule: str, setting: Setting) -> Task:
    assert isinstance(samples, ImageSamples)
    task = imagenet_task(name, ImageSource(name, samples), Labels(setting.model.config), setting.limit)
    chosen = rule if setting.limit is None else f"{rule}; {task.protocol['chosen']}"
    return replace(task, protocol=task.protocol | {"chosen": chosen})


def _mmlu(name: str, setting: Setting) -> Task:
    path = name.partition("=")[2]
    return mmlu_task(Path(path).expanduser() if path else None, setting.limit, setting.num_fewshot)


def _harness(name: str, setting: Setting) -> Task:
    return harness_task(name, setting.limit, setting.num_fewshot, KNOWN)


Maker = Callable[[str, Setting], Task]
MAKERS: dict[str, tuple[str, Maker]] = {
    "heldout": ("any", _heldout),
    "text": ("text", _text),
    **dict.fromkeys(TEXTS, ("text", _text)),
    "imagenet": ("images", _imagenet),
    "mmlu": ("text", _mmlu),
}
"""By the word before `=`: what the task consists of, and who makes it; lm_eval makes all others."""
OF_SAMPLES: dict[str, Callable[[str, Samples, str, Setting], Task]] = {"sequences": _rows, "images": _images}
