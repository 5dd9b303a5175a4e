"""Results as tables."""

from __future__ import annotations

from statistics import mean
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from obsprune.errors import printable


def new_table(title: str, columns: list[str], left: int = 1) -> Table:
    """An empty table; the first `left` columns are aligned to the left."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim",
        show_header=any(columns),
    )  # fmt: skip
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    return table


def add_row(table: Table, *cells: Any) -> None:
    """One more row."""
    table.add_row(*(Text(printable(str(cell))) for cell in cells))  # Text: names from a model are never markup


def plain(*tables: RenderableType) -> str:
    """Tables and maps as text for stdout, as wide as the terminal; where it is a pipe, at least 100 columns."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, 100))
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip()


def times(name: str, count: int) -> str:
    """A name that stands for so many."""
    return f"{name} ({count})" if count > 1 else name


def short(task: str) -> str:
    """A task's name without the directory of its file."""
    kind, equals, path = task.partition("=")
    return f"{kind}{equals}{path.rpartition('/')[2]}"


def seconds(value: float) -> str:
    """Seconds as a person says them."""
    if value < 120:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60} s" if whole < 7200 else f"{whole // 3600} h {whole // 60 % 60} min"


def prune_tables(report: dict[str, Any]) -> list[Table]:
    """Dense against pruned, and the facts of the run."""
    rounds = [_rounds_table(report["rounds"])] if report["rounds"] else []
    scores = [_scores_table(report["evaluation"])] if report["evaluation"] else []
    return [*rounds, *scores, _facts_table(report)]


def _scores_table(evaluation: dict[str, Any]) -> Table:
    scores = new_table("evaluation", ["task", "metric", "dense", "pruned", "change", "p", "on"])
    for task, pair in evaluation.items():
        dense, pruned = pair["dense"], pair["pruned"]
        metric = dense["metric"]
        add_row(
            scores,
            short(task),
            metric,
            f"{dense[metric]:.3f}",
            f"{pruned[metric]:.3f}",
            *change(pruned, dense, pair),
            amount(dense),
        )
    return scores


def change(values: dict[str, Any], others: dict[str, Any], pair: dict[str, Any]) -> tuple[str, str]:
    """How a score differs from another, and how probable that is by chance: (change, p)."""
    from obsprune.report.said import probability  # imports torch

    metric, tests = values["metric"], pair["paired"]
    instead: dict[str, Any] = next(iter(tests.values()), {})  # perplexity itself has no items: its loss has
    test = tests.get(metric, instead)
    p = probability(test["p"]) if test else ""
    if "ratio" in pair:
        return f"x {pair['ratio']:.3f}", p
    stderr = f" ± {tests[metric]['stderr']:.2g}" if metric in tests else ""
    return f"{values[metric] - others[metric]:+.3f}{stderr}", p


def amount(values: dict[str, Any]) -> str:
    """What a score was measured on."""
    if "sequences" in values:
        return f"{values['sequences']} x {values['seqlen']}"
    unit = next((unit for unit in ("images", "questions", "documents") if unit in values), None)
    return f"{values[unit]} {unit}" if unit else ""


def _rounds_table(entries: list[dict[str, Any]]) -> Table:
    told, scored = list(entries[0]["told"]), list(entries[0].get("scores", {}))
    columns = ["round", "KL", *told, *map(short, scored), "step", "rate", "moved", "time"]
    rounds = new_table("rounds, on what was held out", columns)
    for entry in entries:
        further = entry["round"] > 1
        add_row(
            rounds,
            f"{entry['round']}{' *' if entry['best'] else ''}",
            "inf" if entry["heldout_kl"] is None else f"{entry['heldout_kl']:.4f}",
            *(f"{entry['told'][name]:.3f}" for name in told),
            *(_headline(entry.get("scores", {}).get(name)) for name in scored),
            f"{entry['step']:.2g}" if further else "",
            f"{entry['rate']:.2g}" if entry.get("rate") else "",
            f"{entry['moved']:.2%}" if further else "",
            seconds(entry["seconds"]),
        )
    return rounds


def _headline(score: dict[str, Any] | None) -> str:
    """Of a round; one whose logits are not finite has no score."""
    return f"{score[score['metric']]:.3f}" if score else ""


def _facts_table(report: dict[str, Any]) -> Table:
    rows = [*_one_shot_rows(report), ("time", _time(report["seconds"]))]
    if report["rounds"]:
        seen, unit = report["data"]["rounds"]["seen"], report["data"]["unit"]
        rows.append((unit, f"{seen} different ones in all rounds; * best round"))
    return _result_table(report, rows)


def _result_table(report: dict[str, Any], rows: list[tuple[str, str]]) -> Table:
    """What was reached, then what is the command's own, then memory and notes."""
    facts = new_table("result", ["", ""], left=2)
    sparsity, memory = report["sparsity"], report["memory"]
    add_row(
        facts,
        "sparsity",
        f"asked {sparsity['asked']:.4f} ({sparsity['pattern']}), reached {sparsity['reached']:.4f} "
        f"of {sparsity['weights']:,} weights in {len(report['matrices'])} matrices",
    )
    for row in rows:
        add_row(facts, *row)
    add_row(
        facts,
        "peak memory",
        ", ".join(f"{value / 1e9:.2f} GB {key.removesuffix('_bytes')}" for key, value in memory.items()),
    )
    for warning in report["warnings"]:
        add_row(facts, "note", warning)
    return facts


def training_tables(report: dict[str, Any]) -> list[Table]:
    """The steps, dense against pruned, and the facts of the run."""
    steps = new_table("steps", ["step", "sparsity", "training loss", "time"])
    for step in report["steps"]:
        loss = "" if step["loss"] is None else f"{step['loss']:.4f}"
        add_row(steps, step["number"], f"{step['sparsity']:.4f}", loss, seconds(step["seconds"]))
    training = report["training"]
    trained = f"{training['parameters']:,} weights in the blocks, by Adam at {training['lr']:g}; the rest as stored"
    rows = [("trained", trained), ("time", _time(report["seconds"]))]
    scores = [_scores_table(report["evaluation"])] if report["evaluation"] else []
    return [steps, *scores, _result_table(report, rows)]


def _time(spent: dict[str, float]) -> str:
    """The total, and the parts that took any."""
    parts = {"allocation": "allocation", "pruning": "pruning", "rounds": "further rounds", "steps": "steps"}
    told = ", ".join(f"{name} {seconds(spent[key])}" for key, name in parts.items() if spent.get(key))
    return f"{seconds(spent['total'])} ({told})"


def _one_shot_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What allocation and block matching did."""
    rows = []
    tried = report["allocation"]["tried"]
    if tried:
        scores = ", ".join(f"{rule} {score['nll']:.4f}" for rule, score in tried.items())
        rows.append(("allocation", f"{report['allocation']['rule']} (held-out loss: {scores})"))
    if report["coverage"]:
        rows.append(("experts", _coverage(report["coverage"])))
    if report["matching"]:
        before, after = (mean(block[when] for block in report["matching"]) for when in ("before", "after"))
        rows.append(("matching", f"mean error of a block {before:.3g}, matched {after:.3g}"))
    return rows


def _coverage(layers: list[dict[str, Any]]) -> str:
    """How many experts there are, the tokens they saw, and what became of those that saw too few."""
    seen = [tokens for layer in layers for tokens in layer["tokens"]]
    starved = sum(len(layer["starved"]) for layer in layers)
    told = f"{len(seen)} in {len(layers)} layers, of {min(seen):,} to {max(seen):,} tokens"
    fewest, unseen = max(layer["fewest"] for layer in layers), sum(len(layer["unseen"]) for layer in layers)
    if starved:
        told += f"; {starved} saw fewer than {fewest:,} and were {layers[0]['fate']}"
    return told + (f"; {unseen} saw none and were pruned by magnitude" if unseen else "")


def eval_table(scores: dict[str, Any]) -> str:
    """Scores with their protocol; two models side by side when there are two; then subjects, where a task has them."""
    table = new_table("", ["task", "model", "metric", "score", "± stderr", "change", "p", "on"], left=3)
    parts = []
    for task, entry in scores["tasks"].items():
        for who in ("model", "compare"):
            if who in entry:
                score = entry[who]
                metric = score["metric"]
                stderr = score.get(f"{metric}_stderr")
                differs = change(score, entry["compare"], entry) if who == "model" and "compare" in entry else ("", "")
                add_row(
                    table,
                    short(task),
                    scores[who],
                    metric,
                    f"{score[metric]:.4f}",
                    _number(stderr),
                    *differs,
                    amount(score),
                )
        parts += _parts_tables(task, entry)
    return plain(table, *_protocols(scores), *parts)


def _protocols(scores: dict[str, Any]) -> list[Table]:
    """How each task was measured, one line each."""
    table = new_table("protocol", ["", ""], left=2)
    for task, entry in scores["tasks"].items():
        told = (
            *(
                "corpus",
                "coverage",
                "split",
                "chosen",
                "limit",
                "join",
                "num_fewshot",
                "requests",
                "truncated_requests",
            ),
            *("img_size", "crop_pct", "interpolation", "damaged_images", "images_per_second"),
        )
        facts = {key: entry["model"][key] for key in told if entry["model"].get(key) is not None}
        add_row(table, short(task), ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items()))
    return [table]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _parts_tables(task: str, entry: dict[str, Any]) -> list[Table]:
    """Scores by group and by subject."""
    tables, metric = [], entry["model"]["metric"]
    for kind in ("groups", "subjects"):
        if entry["model"].get(kind):
            who = [name for name in ("model", "compare") if name in entry]
            table = new_table(f"{short(task)}, {kind}", ["", *who, "± stderr", "questions"])
            for name, part in entry["model"][kind].items():
                scores = [_number(entry[one][kind][name][metric]) for one in who]
                add_row(table, name, *scores, _number(part[f"{metric}_stderr"]), part["questions"])
            tables.append(table)
    return tables


def verdict_table(name: str, results: dict[str, Any]) -> Table:
    """PASS or the difference, for each expected value of an experiment."""
    kind = ", smoke run" if results["smoke"] else ""
    table = new_table(
        f"{name}{kind}, {seconds(results['seconds'])}", ["value", "verdict", "found", "expected", "source"], left=5
    )
    for one in results["verdicts"]:
        verdict = "PASS" if one["met"] else "DIFFERS"
        found = "not measured" if one["found"] is None else f"{one['found']:.4g}"
        add_row(table, one["name"], verdict, found, one["expected"], one["source"])
    if not results["verdicts"]:
        add_row(table, "nothing is expected of this run", "", "", "", "")
    return table
