"""The model card of a result, README.md: what its report says, for whoever finds it on the hub.

Nothing in it depends on time or place, so a run that was continued writes the same card. What comes from a model, a
data set or a command line is escaped: it is text, never markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from obsprune.errors import printable
from obsprune.report import said
from obsprune.report.markdown import fenced, md, table
from obsprune.report.pathless import pathless, pathless_command, without_known

Report = Mapping[str, Any]
HERE = "."
"""As which a card names a result that nobody has given a name."""
PATTERNS = {
    "unstructured": "unstructured: zeros wherever they cost least",
    "row": "as many zeros in each row",
}
"""What a pattern means that is not n:m."""
WHO = ("dense", "pruned", "tuned")
"""Whose scores a report may have."""


@dataclass(frozen=True)
class Shown:
    """How a kind of model is called on the hub, and the classes that load it."""

    task: str
    model: str
    processor: str


KINDS = {
    "causal language model": Shown("text-generation", "AutoModelForCausalLM", "AutoTokenizer"),
    "vision-language model": Shown("image-text-to-text", "AutoModelForImageTextToText", "AutoProcessor"),
    "image classifier": Shown("image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
}
"""By the name in models/kinds.py."""


def make_card(report: Report, name: str = HERE, packed: bool | None = None) -> str:
    """The text of a card. name: under which the model is loaded; packed: whether its weights are; where nobody says,
    they may be some day, and the card tells how to load them then.
    """
    packed = True if packed is None and "packed" in report else packed
    report = without_known(report)
    parts = [_head(report), _facts(report), _scores(report), _made(report), _load(report, name, packed), _uses(packed),
             _licence(report), _notes(report)]  # fmt: skip
    body = "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines)
    return f"---\n{front_matter(report).to_yaml()}\n---\n\n{body}\n"


def front_matter(report: Report) -> ModelCardData:
    """What the hub reads: tags, the dense model where it is there, its licence where it says one."""
    base, shown = report["model"].get("base"), KINDS.get(report["model"]["kind"])
    terms: dict[str, Any] = {key: printable(told) for key, told in report["model"].get("licence", {}).items()}
    return ModelCardData(
        base_model=base["id"] if base else None,
        library_name="transformers",
        pipeline_tag=shown.task if shown else None,
        tags=["obsprune", "pruned", "sparse", printable(method(report))],
        **terms,
    )


def is_own(text: str, report: Report) -> bool:
    """Whether a card is as obsprune wrote it, so that a better one may take its place."""
    return text == make_card(report)


def method(report: Report) -> str:
    """One word for what was done: the solver, or the criterion of train-prune."""
    return _way(report).word(report["recipe"])


def method_of(report: Report) -> str:
    """What was done, in a line of plain text: that word, and all that was done beside it."""
    return ", ".join([method(report), *_way(report).beside(report)])


def _way(report: Report) -> Way:
    return next(way for part, way in WAYS.items() if part in report["recipe"])


def title(report: Report) -> str:
    """The model and its sparsity, as plain text: Llama-2-7b-hf, 50 % sparse (2:4)."""
    sparsity = report["sparsity"]
    pattern = f" ({sparsity['pattern']})" if ":" in sparsity["pattern"] else ""
    return f"{_source(report).rpartition('/')[2]}, {100 * sparsity['reached']:.4g} % sparse{pattern}"


def _source(report: Report) -> str:
    base = report["model"].get("base")
    return base["id"] if base else pathless(report["model"]["source"])


def _head(report: Report) -> Iterator[str]:
    base, sparsity = report["model"].get("base"), report["sparsity"]
    source = f"[{md(base['id'])}](https://huggingface.co/{base['id']})" if base else md(_source(report))
    at = f" (revision {base['revision'][:12]})" if base else ""
    yield f"# {md(title(report))}"
    yield ""
    yield (
        f"The {md(report['model']['kind'])} {source}{at} with exact zeros in place of {sparsity['zeros']:,} of "
        f"{sparsity['weights']:,} weights, pruned by obsprune {md(report['versions']['obsprune'])}."
    )


def _facts(report: Report) -> list[str]:
    sparsity, matrices = report["sparsity"], report["matrices"]
    dense = Counter(report["skipped"].values())
    rows = [
        ("sparsity", f"{sparsity['reached']:.4f} of {len(matrices)} matrices; {sparsity['asked']:.4f} asked"),
        ("pattern", md(_pattern(sparsity["pattern"]))),
        *_way(report).rows(report),
        ("left dense", "; ".join(f"{md(why)}: {count}" for why, count in dense.items()) or "nothing"),
        (_reads(report), _calibration(report["data"])),
        ("versions", ", ".join(f"{md(name)} {md(one)}" for name, one in report["versions"].items())),
    ]
    return table(["", ""], rows)


def _pattern(name: str) -> str:
    kept, _, every = name.partition(":")
    return f"{name}: {kept} kept of every {every} inputs" if every else PATTERNS.get(name, name)


def _solving(report: Report) -> Iterator[tuple[str, str]]:
    recipe = report["recipe"]
    options = ", ".join(f"{md(key)} {md(value)}" for key, value in recipe["solver"].items() if key != "name")
    yield "solver", f"{md(method(report))} ({options})"
    yield "target of a layer", md(recipe["target"])
    if report["matching"]:
        yield "block matching", f"{recipe['matching']['passes']} passes at most"
    if report["rounds"]:
        yield "rounds", f"{len(report['rounds'])}, of which the best one was kept"
    if report["allocation"]["tried"]:
        yield "zeros shared out by", md(report["allocation"]["rule"])


def _beside_solving(report: Report) -> Iterator[str]:
    recipe, solver, rule = report["recipe"], report["recipe"]["solver"], report["allocation"]["rule"]
    refit, rounds = solver.get("refit"), len(report["rounds"])
    told = {
        "exact refit" if solver.get("exact") else f"refit {refit}": refit or solver.get("exact"),
        "compensated biases": solver.get("compensate"),
        f"{recipe['target']} targets": recipe["target"] != "own",
        "block matching": report["matching"],
        f"zeros shared out by {rule}": rule != "uniform",
        said.counted(rounds, "round", "rounds"): rounds,
    }
    return (what for what, done in told.items() if done)


def _training(report: Report) -> Iterator[tuple[str, str]]:
    part = report["recipe"]["training"]
    yield "criterion", f"{md(part['method'])} (curvature {md(part['curvature'])})"
    yield "steps", f"{part['steps']}, each with {part['epochs']} epochs of retraining after it"


def _tuning(report: Report) -> Iterator[tuple[str, str]]:
    part = report["recipe"]["tuning"]
    teacher = f"toward {md(part['teacher'])}" if part["teacher"] else "on the next token alone"
    yield "fine-tuning", f"{part['steps']} steps {teacher}; every zero stayed"


def _beside_steps(report: Report) -> Iterator[str]:
    part = next(report["recipe"][name] for name in ("training", "tuning") if name in report["recipe"])
    yield said.counted(part["steps"], "step", "steps")


@dataclass(frozen=True)
class Way:
    """What a command did. word: for it, of the recipe; beside: what else was done; rows: of the card's table."""

    word: Callable[[Mapping[str, Any]], str]
    beside: Callable[[Report], Iterator[str]]
    rows: Callable[[Report], Iterator[tuple[str, str]]]


WAYS = {
    "solver": Way(lambda recipe: str(recipe["solver"]["name"]), _beside_solving, _solving),
    "training": Way(lambda recipe: str(recipe["training"]["method"]), _beside_steps, _training),
    "tuning": Way(lambda recipe: "distilled" if recipe["tuning"]["teacher"] else "finetuned", _beside_steps, _tuning),
}
"""By the part that a command alone has in its recipe."""


def _reads(report: Report) -> str:
    return "trained on" if "tuning" in report["recipe"] else "calibration"


def _calibration(data: Mapping[str, Any]) -> str:
    unit = str(data["unit"])
    length = f" of {data['seqlen']} tokens" if "seqlen" in data else ""
    sums = f"sha256 {data['sha256'][:12]}" if data.get("sha256") else ""
    trained = f", {data['trained']:,} to train on" if "trained" in data else ""
    return (
        f"{md(data['dataset'])}: {data.get(unit, 0):,} {md(unit)}{length}{trained}; {data['heldout']} held out; {sums}"
    )


def _scores(report: Report) -> list[str]:
    if not report["evaluation"]:
        return ["## Scores", "", "The result was not evaluated."]
    scores = report["evaluation"]
    who = [one for one in WHO if all(one in scores[task] for task in scores)]
    rows = [_row(task, [scores[task][one] for one in who]) for task in scores]
    protocols = [f"- {md(task)}: {_protocol(scores[task][who[0]])}" for task in scores]
    return ["## Scores", "", *table(["task", "metric", *who], rows), "", "Measured alike on all:", "", *protocols]


def _row(task: str, scores: list[Mapping[str, Any]]) -> list[str]:
    metric = scores[0]["metric"]
    return [md(task), md(metric), *(said.score(score[metric]) for score in scores)]


def _protocol(score: Mapping[str, Any]) -> str:
    """What a score was measured on, and how: all of it that is a short plain value."""
    told = {key: value for key, value in score.items() if key not in ("metric", "seconds", "sha256")}
    facts = [f"{md(key)} {md(value)}" for key, value in told.items() if isinstance(value, str | int) and value != ""]
    return ", ".join([*facts, f"sha256 {md(score['sha256'][:12])}"])


def _made(report: Report) -> Iterator[str]:
    yield "## How it was made"
    yield ""
    if report["command"]:
        yield from fenced("text", [printable(pathless_command(report["command"]))])
        yield ""
    yield "recipe.yaml has every setting, report.json all that was measured. Of local paths only the end is shown."


def _load(report: Report, name: str, packed: bool | None) -> list[str]:
    shown = KINDS.get(report["model"]["kind"])
    if shown is None:
        return []
    trusting = ", trust_remote_code=True" if report["recipe"]["model"]["trust_remote_code"] else ""
    lines = [
        *(["import obsprune  # pip install obsprune: it reads the packed weights"] if packed else []),
        f"from transformers import {shown.model}, {shown.processor}",
        f'model = {shown.model}.from_pretrained("{name}"{trusting})',
        f'processor = {shown.processor}.from_pretrained("{name}"{trusting})',
    ]
    later = (
        "If the weights are packed (obsprune pack; their files are called obsprune…), `import obsprune` comes first."
    )
    return ["## Load it", "", *fenced("python", lines), *(["", later] if packed is None else [])]


LOST = (
    "Pruning hurts: compare the scores. Whatever the dense model should not be used for, this one should not either; "
    "what it lost beside the scores above was not measured."
)


def uses(packed: bool | None) -> list[str]:
    """What a result is good for, and what not, in sentences."""
    stored = "the files are packed, smaller on disk alone." if packed else "zeros are stored as other numbers are."
    return [
        "Good for research, for sparse fine-tuning, and for files that compress well.",
        f"Not faster by itself: {stored} In memory the model is as large as the dense one, and ordinary inference "
        "servers run it at the same speed.",
        LOST,
    ]


def _uses(packed: bool | None) -> list[str]:
    return ["## What it is good for, and what not", "", *(f"- {one}" for one in uses(packed))]


def _licence(report: Report) -> list[str]:
    told = report["model"].get("licence", {})
    said = f"{md(told.get('license_name', told['license']))}, as the dense model says" if told else None
    unsaid = "The dense model's files name none; its terms decide whether and how this copy may be shared."
    return ["## Licence", "", f"{said}." if said else unsaid]


def _notes(report: Report) -> list[str]:
    notes = [f"- {md(warning)}" for warning in report["warnings"]]
    return ["## Notes of the run", "", *notes] if notes else []
