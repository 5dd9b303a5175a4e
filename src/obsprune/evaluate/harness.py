"""Tasks that EleutherAI's harness (lm_eval, extra `obsprune[eval]`) scores: all of its own, and MMLU from a folder.

Prompts, few-shot examples, metrics, groups and standard errors are lm_eval's, so that numbers can be compared with
published ones; for MMLU only the place the questions come from is ours.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, final
from unittest.mock import patch

from obsprune.errors import InputError, ObspruneError, first_line
from obsprune.evaluate.mmlu import Documents, read_mmlu
from obsprune.evaluate.task import Scored, Task
from obsprune.models.load import Model
from obsprune.progress import Progress

HEADLINES = ("acc_norm", "acc", "exact_match", "pass@1", "f1", "word_perplexity", "perplexity")
"""The headline is the first of these that a task reports, else the first metric it reports."""
MMLU_SHOTS = 5
"""The published protocol; lm_eval's own default is none."""
SEED = 1234
"""lm_eval's own, for tasks that draw few-shot examples at random."""
LOGITS = 2**28
"""Logits of one batch; they and their log-probabilities take 2 GiB in float32."""


@final
@dataclass(frozen=True)
class HarnessTask(Task):
    """tasks, groups: lm_eval's own, by name; root: the one whose metric is the headline; limit: documents of each task.

    values: {metric}, {metric}_stderr and questions, of the whole and, where there are parts, of all `groups` and
    `subjects`; `metrics`: all that lm_eval reports of the whole; `requests`, and how many of them lost their beginning
    because they are longer than the model's context. items: the headline metric of each document, if it is a number.
    """

    name: str
    metric: str
    protocol: dict[str, Any]
    root: str
    tasks: dict[str, Any]
    groups: dict[str, Any]
    limit: int | None

    def score(self, model: Model, progress: Progress, who: str) -> Scored:
        """Raises InputError when the model does not fit the task, ObspruneError when its logits are not finite."""
        if not model.kind.positional:
            raise InputError(f"task {self.name} asks a language model; {model.directory} is an {model.kind.name}")
        for task in self.tasks.values():  # before each model: all models see the same few-shot examples
            task.set_fewshot_seed(SEED)
        bars = partial(_Bar, progress, f"{self.root}, {who}")
        with model.loaded(), _quiet(), _tamed(model.network, bars):
            try:
                asked = _asked(model)
                loaded = {"tasks": self.tasks, "groups": self.groups}
                report = _lm_eval("evaluator").evaluate(asked, loaded, limit=self.limit, bootstrap_iters=1)
            except AssertionError as error:  # how lm_eval says that a model and a task do not fit
                raise InputError(f"task {self.name}: lm_eval refuses this model: {first_line(error)}") from error
        values, items = self._told(report)
        return Scored({**values, **asked.counts, **self.protocol}, items)

    def _told(self, report: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """lm_eval's report in our words: values and items."""
        results = {name: _numbers(result) for name, result in report["results"].items()}
        key = next(key for key in results[self.root] if key.split(",")[0] == self.metric)
        parts = {name: self._headline(result, key) for name, result in results.items() if key in result}
        whole = parts.pop(self.root)
        values = {"metric": self.metric, **whole, "metrics": {**results[self.root]}}
        del values["metrics"]["sample_len"]
        if parts:
            values["groups"] = {self._short(name): parts.pop(name) for name in self.groups if name in parts}
            values["subjects"] = {self._short(name): part for name, part in parts.items()}
        chosen = key.partition(",")[2] or "none"
        samples = [sample for name in self.tasks for sample in report["samples"][name] if sample["filter"] == chosen]
        items = [sample.get(self.metric) for sample in samples]
        return values, {self.metric: [float(item) for item in items]} if all(map(_is_number, items)) else {}

    def _headline(self, result: dict[str, float | None], key: str) -> dict[str, Any]:
        error = key.replace(self.metric, f"{self.metric}_stderr", 1)
        questions = int(result["sample_len"] or 0)
        return {self.metric: result[key], f"{self.metric}_stderr": result.get(error), "questions": questions}

    def _short(self, name: str) -> str:
        return name.removeprefix(f"{self.root}_")


def mmlu_task(path: Path | None, limit: int | None, num_fewshot: int | None) -> Task:
    """MMLU from a folder in one of the two layouts, or (None) from the hub; `limit` questions a subject, 5 shots.

    Raises InputError when lm_eval is missing, or a file is, or is not what it should be.
    """
    with _quiet(), _explained("mmlu", "offline, give a folder: --task mmlu=PATH"):
        tasks = _lm_eval("tasks")
        configs = Path(tasks.__file__).parent / "mmlu" / "default"
        manager = tasks.TaskManager(include_path=configs, include_defaults=False)
        index = {name: entry.cfg or {"task": sorted(entry.tags)} for name, entry in manager.task_index.items()}
        subjects = {config["dataset_name"] for config in index.values() if "dataset_name" in config}
        shots = MMLU_SHOTS if num_fewshot is None else num_fewshot
        material = None if path is None else read_mmlu(path.expanduser(), subjects, shots)
        loaded = manager.load([_mmlu_group(index, material)])
        facts = {
            "corpus": "cais/mmlu" if path is None else str(path),
            "coverage": f"{len(loaded['tasks'])} of {len(subjects)} subjects",
        }
        return _task("mmlu" if path is None else f"mmlu={path}", loaded, limit, shots, facts)


def _mmlu_group(index: dict[str, dict[str, Any]], material: dict[str, dict[str, Documents]] | None) -> Any:
    """lm_eval's group of groups of subjects, only with those there is material for; None: all, from the hub."""
    kind = _lm_eval("api.group").Group
    root = kind.from_config(index["mmlu"])
    for name in index["mmlu"]["task"]:
        group = kind.from_config(index[name])
        names = [subject for tag in index[name]["task"] for subject in index[tag]["task"]]
        for config in (index[subject] for subject in names):
            if material is None or config["dataset_name"] in material:
                group.add(_mmlu_subject(config, material))
        if len(group):
            root.add(group)
    return root


def _mmlu_subject(config: dict[str, Any], material: dict[str, dict[str, Documents]] | None) -> Any:
    """lm_eval's own task; its documents replaced by those of the folder."""
    own = {key: value for key, value in copy.deepcopy(config).items() if key != "tag"}
    if material is not None:
        own["custom_dataset"] = lambda **_: material[config["dataset_name"]]
    return _lm_eval("api.task").ConfigurableTask(config=own)


def harness_task(name: str, limit: int | None, num_fewshot: int | None, own: Sequence[str] = ()) -> Task:
    """Any task or group of lm_eval, by its name or its YAML file; `limit` documents of each task. own: names of our
    tasks, for whoever mistyped one.

    Raises InputError when lm_eval is missing or does not know it, when its data cannot be had, when it runs code that
    a model wrote or needs more than text, and when several tasks have no common score.
    """
    with _quiet(), _explained(name, "most tasks need the hub, or its data set in the Hugging Face cache"):
        manager = _lm_eval("tasks").TaskManager(include_defaults=not Path(name).is_file())
        if name not in manager.all_tasks and not Path(name).is_file():
            close = difflib.get_close_matches(name, [*own, *manager.all_tasks], n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise InputError(
                f"unknown task '{name}'; {hint}known: {', '.join([*own, 'what `lm-eval ls tasks` lists'])}"
            )
        return _task(name, manager.load([name]), limit, num_fewshot, {})


def _task(name: str, loaded: dict[str, Any], limit: int | None, shots: int | None, facts: dict[str, Any]) -> Task:
    """Checks what lm_eval loaded, tries its prompts, and adds the protocol."""
    tasks, groups = loaded["tasks"], loaded["groups"]
    root = next(iter(groups or tasks))
    if limit is not None and limit < 1:
        raise InputError(f"task {name}: a limit of {limit} leaves no question")
    if len(tasks) > 1 and not (groups and groups[root].has_aggregation):
        raise InputError(f"{name} stands for tasks without a common score; name one of them: {', '.join(tasks)}")
    for task in tasks.values():
        _prepare(task, shots)
    reported = [m.metric for m in groups[root].aggregate_metric_list] if groups else list(tasks[root].aggregation())
    metric = next((metric for metric in HEADLINES if metric in reported), reported[0])
    number = sorted({task.get_config("num_fewshot") for task in tasks.values()})
    protocol = {
        **facts,
        "num_fewshot": number[0] if len(number) == 1 else number,
        "limit": limit,
        "version": str(groups[root].version if groups else tasks[root].VERSION),
        "lm_eval": _lm_eval("").__version__,
        "sha256": _content_hash(tasks, limit),
    }
    return HarnessTask(name, metric, protocol, root, tasks, groups, limit)


def _prepare(task: Any, shots: int | None) -> None:
    """Sets the few-shot examples and makes one prompt: what is wrong with a task shows before a model is loaded."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise InputError(f"{task.task_name} runs code that the model wrote, or needs more than text; neither is done")
    own = task.get_config("num_fewshot")
    if own == 0 and shots:
        raise InputError(f"{task.task_name} is defined without few-shot examples, and {shots} are asked for")
    task.set_config("num_fewshot", (own or 0) if shots is None else shots)
    task.set_fewshot_seed(SEED)
    task.fewshot_context(task.eval_docs[0], num_fewshot=task.get_config("num_fewshot"))


def _content_hash(tasks: dict[str, Any], limit: int | None) -> str:
    """SHA-256 over all that is asked and shown, whatever files it came from."""
    digest = hashlib.sha256()
    for name, task in tasks.items():
        shots = task.get_config("num_fewshot")
        shown = list(task.fewshot_docs() or ()) if shots else []
        said = [name, str(task.VERSION), shots, list(islice(task.eval_docs, limit)), shown]
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ lm_eval, made quiet


def _lm_eval(module: str) -> Any:
    """A module of lm_eval, not imported before. Raises InputError when it is not installed."""
    try:
        return importlib.import_module(f"lm_eval.{module}".rstrip("."))
    except ModuleNotFoundError as error:
        raise InputError(f"this task needs lm_eval: pip install 'obsprune[eval]' ({first_line(error)})") from error


@contextmanager
def _explained(name: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except ObspruneError:
        raise
    except Exception as error:  # data sets, templates and metrics of thousands of tasks have no common error
        raise InputError(
            f"lm_eval cannot prepare {name}: {first_line(error)} ({type(error).__name__}); {remedy}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, no library logs or warns: lm_eval warns of each prompt that is too long."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _tamed(network: Any, bars: Callable[..., Any]) -> Iterator[None]:
    """While open, lm_eval tells its progress to `bars`, ties no weights, and skips the bootstrap.

    Its HFLM ties a head to the embedding wherever the config says so, even where the checkpoint holds another head.
    Asked for no bootstrap, it would leave out the standard errors that need none, too.
    """
    instead = [
        (network, "tie_weights", lambda: None),
        (_lm_eval("api.metrics"), "bootstrap_stderr", lambda *_, **__: "N/A"),
        *((_lm_eval(module), "tqdm", bars) for module in ("api.task", "api.model", "models.huggingface")),
    ]
    with ExitStack() as stack:
        for owner, name, value in instead:
            stack.enter_context(patch.object(owner, name, value))
        yield


class _Bar:
    """A bar of tqdm, as far as lm_eval uses one, that tells our progress. Bars without a name (prompts) stay silent."""

    def __init__(self, progress: Progress, title: str, items: Iterable[Any] = (), **told: Any) -> None:
        self.items, self.progress, self.named = items, progress, "desc" in told
        if self.named:
            doing = told["desc"].removeprefix("Running ").lower()
            progress.stage(f"{title}, {doing}", told.get("total") or len(list(items)))

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update(1)

    def update(self, count: int) -> None:
        for _ in range(count if self.named else 0):
            self.progress.step()

    def close(self) -> None: ...


def _asked(model: Model) -> Any:
    """The model as lm_eval asks it: HFLM with batches as large as their logits allow, and a count of long requests."""

    class Asked(_lm_eval("models.huggingface").HFLM):  # type: ignore[misc]
        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.batch_size_per_gpu = sys.maxsize  # all windows come below together
            return super().loglikelihood_rolling(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            lengths = [len(context) + len(continuation) for _, context, continuation in requests]
            longest = min(max(lengths), self.max_length + 1)
            self.batch_size_per_gpu = max(1, min(64, LOGITS // (longest * model.classes)))
            self.counts["requests"] += len(requests)
            self.counts["truncated_requests"] += sum(length > longest for length in lengths)
            mine = super()._loglikelihood_tokens(requests[model.ranks.rank :: model.ranks.size], disable_tqdm)
            answers = [answer for turn in zip_longest(*model.ranks.gather(mine)) for answer in turn if answer]
            if any(math.isnan(loglikelihood) for loglikelihood, _ in answers):
                raise ObspruneError("the model's logits are not finite; evaluate in a wider type (--dtype float32)")
            return answers

    # lm_eval gives a tokenizer without padding some; the model's own stays as it is
    asked = Asked(model.network, backend="causal", tokenizer=copy.deepcopy(model.processor), batch_size=8)
    asked.counts = {"requests": 0, "truncated_requests": 0}
    return asked


def _is_number(value: Any) -> bool:
    return value is not None and not isinstance(value, (str, list, tuple, dict))


def _numbers(result: dict[str, Any]) -> dict[str, float | None]:
    """Numbers of one result by metric (`metric,filter` where answers were filtered); None: lm_eval has no value."""
    named = {key.removesuffix(",none"): value for key, value in result.items() if "," in key or key == "sample_len"}
    return {key: float(value) if _is_number(value) else None for key, value in named.items()}
