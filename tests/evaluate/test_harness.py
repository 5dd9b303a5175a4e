"""Tasks of lm_eval: its prompts to the byte, log-likelihoods against a plain forward, MMLU's layouts, bad files."""

from __future__ import annotations

import csv
import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from obsprune.errors import InputError, ObspruneError
from obsprune.evaluate.harness import HarnessTask, harness_task, mmlu_task, read_mmlu
from obsprune.evaluate.task import Scored
from obsprune.models.load import Model, load
from obsprune.progress import Silent

SUBJECTS = ("abstract_algebra", "anatomy", "world_religions")  # two of stem, one of the humanities
LETTERS = "ABCD"


@dataclass
class Steps(Silent):
    """Remembers every stage: [title, total, steps]."""

    stages: list[list[Any]] = field(default_factory=list)

    def stage(self, title: str, total: int) -> None:
        self.stages.append([title, total, 0])

    def step(self, text: str = "") -> None:
        self.stages[-1][2] += 1


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval.evaluator", reason="needs obsprune[eval]")


@pytest.fixture(scope="module")
def stories(assets: Path) -> Path:
    return assets / "stories260k"


@pytest.fixture(scope="module")
def model(stories: Path) -> Model:
    return load(str(stories), device="cpu")


def rows(mmlu: Path, subject: str, split: str) -> list[list[str]]:
    with (mmlu / split / f"{subject}_{split}.csv").open(newline="") as stream:
        return list(csv.reader(stream))


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


@pytest.fixture(scope="module")
def folder(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects with six questions each, as the assets have them."""
    path = tmp_path_factory.mktemp("mmlu")
    for subject in SUBJECTS:
        for split in ("dev", "test"):
            write_csv(path / split / f"{subject}_{split}.csv", rows(assets / "mmlu", subject, split)[:7])
    return path


def original(folder: Path, path: Path) -> None:
    """The original release: no header, letters."""
    for file in folder.glob("*/*.csv"):
        told = rows(folder, file.stem.rpartition("_")[0], file.parent.name)[1:]
        write_csv(path / file.parent.name / file.name, [[*row[:5], LETTERS[int(row[5])]] for row in told])


def hub(folder: Path, path: Path) -> None:
    """cais/mmlu, which has other folders, too."""
    for file in folder.glob("*/*.csv"):
        subject, split = file.stem.rpartition("_")[0], file.parent.name
        told = rows(folder, subject, split)[1:]
        table = {
            "question": [row[0] for row in told],
            "subject": subject,
            "choices": [row[1:5] for row in told],
            "answer": [int(row[5]) for row in told],
        }
        for name in (subject, "all"):
            (path / name).mkdir(parents=True, exist_ok=True)
            pandas.DataFrame(table).to_parquet(path / name / f"{split}-00000-of-00001.parquet")


# ------------------------------------------------------------------------------------------------ the documents


def test_all_layouts_give_the_same_documents(folder: Path, tmp_path: Path) -> None:
    expected = read_mmlu(folder, SUBJECTS)
    for write in (original, hub):
        write(folder, tmp_path / write.__name__)
        assert read_mmlu(tmp_path / write.__name__, SUBJECTS) == expected
    first = expected["abstract_algebra"]["dev"][0]
    assert first["question"] == "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field."
    assert (first["choices"], first["answer"], first["subject"]) == (["0", "1", "2", "3"], 1, "abstract_algebra")
    assert {len(split) for splits in expected.values() for split in splits.values()} == {5, 6}


def test_the_hash_is_of_the_documents(lm_eval: Any, folder: Path, tmp_path: Path) -> None:
    hub(folder, tmp_path / "hub")
    one, other = mmlu_task(folder, None, None), mmlu_task(tmp_path / "hub", None, None)
    assert one.protocol["sha256"] == other.protocol["sha256"] != mmlu_task(folder, 3, None).protocol["sha256"]
    assert one.protocol["coverage"] == "3 of 57 subjects"
    assert (one.protocol["num_fewshot"], one.protocol["limit"], one.metric) == (5, None, "acc")
    assert one.name == f"mmlu={folder}"


GOOD = ["Which?", "w", "x", "y", "z", "2"]
HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
BAD_ROWS: list[tuple[list[list[str]], str]] = [
    ([HEADER, GOOD, GOOD[:5]], r"anatomy_test.csv, row 3: 5 fields; a question, four choices and the answer"),
    ([GOOD, [*GOOD, "7"]], "row 2: 7 fields"),
    ([GOOD, []], "row 2: 0 fields"),
    ([HEADER, [" ", *GOOD[1:]]], "row 2: the question is empty"),
    ([HEADER, [*GOOD[:5], "4"]], "row 2: the answer '4' is none of 0, 1, 2, 3 or A, B, C, D"),
    ([["q", "a", "b", "c", "d", "answer"], GOOD], "row 1: the answer 'answer'"),
    ([HEADER], "anatomy_test.csv holds no question"),
    ([], "anatomy_test.csv holds no question"),
]


@pytest.mark.parametrize(("told", "message"), BAD_ROWS)
def test_bad_rows(tmp_path: Path, told: list[list[str]], message: str) -> None:
    write_csv(tmp_path / "dev" / "anatomy_dev.csv", [GOOD])
    write_csv(tmp_path / "test" / "anatomy_test.csv", told)
    with pytest.raises(InputError, match=message):
        read_mmlu(tmp_path, SUBJECTS)


BAD_BYTES = {"latin": b"caf\xe9,a,b,c,d,1\n", "quote": b'Which?,a,b,c,d,1\n"Which?,a,b,c,d,1\n'}


@pytest.mark.parametrize("kind", BAD_BYTES)
def test_bad_bytes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "anatomy_dev.csv").write_bytes(BAD_BYTES[kind])
    with pytest.raises(InputError, match=r"anatomy_dev.csv cannot be read as CSV after row"):
        read_mmlu(tmp_path, SUBJECTS)


BAD_TABLES: list[tuple[dict[str, list[Any]], str]] = [
    ({"question": ["Which?"], "choices": [list("wxyz")]}, "anatomy/dev-00000-of-00001.parquet is no table of question"),
    ({"question": ["Which?"] * 2, "choices": [list("wxyz"), list("wxy")], "answer": [0, 1]}, "row 2: 5 fields"),
    ({"question": ["Which?"], "choices": [list("wxyz")], "answer": [4]}, "row 1: the answer '4'"),
    ({"question": [None, "Which?"], "choices": [list("wxyz")] * 2, "answer": [0, 1]}, "row 1: 6 fields"),
    ({"question": ["Which?"], "choices": [None], "answer": [1]}, "row 1: 2 fields"),
]


@pytest.mark.parametrize(("table", "message"), BAD_TABLES)
def test_bad_tables(tmp_path: Path, table: dict[str, list[Any]], message: str) -> None:
    (tmp_path / "anatomy").mkdir()
    pandas.DataFrame(table).to_parquet(tmp_path / "anatomy" / "dev-00000-of-00001.parquet")
    with pytest.raises(InputError, match=message):
        read_mmlu(tmp_path, SUBJECTS)


def test_a_damaged_table(tmp_path: Path) -> None:
    (tmp_path / "anatomy").mkdir()
    (tmp_path / "anatomy" / "dev-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"dev-00000-of-00001.parquet is no table of question, choices, answer \("):
        read_mmlu(tmp_path, SUBJECTS)


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "notes.txt").write_text("")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path):
        with pytest.raises(InputError, match=rf"{path} is no folder with MMLU .*cais/mmlu"):
            read_mmlu(path, SUBJECTS)
    write_csv(tmp_path / "test" / "anatomy_test.csv", [GOOD])
    with pytest.raises(InputError, match="has no dev split of anatomy; add it"):
        read_mmlu(tmp_path, SUBJECTS)
    write_csv(tmp_path / "dev" / "anatomy_dev.csv", [GOOD])
    assert set(read_mmlu(tmp_path, SUBJECTS, shots=1)) == {"anatomy"}
    with pytest.raises(InputError, match="5 few-shot examples are asked for and the dev split of anatomy has 1"):
        read_mmlu(tmp_path, SUBJECTS, shots=5)
    write_csv(tmp_path / "dev" / "anatomie_dev.csv", [GOOD])
    with pytest.raises(InputError, match=r"anatomie_dev.csv: MMLU has no subject 'anatomie'; did you mean anatomy"):
        read_mmlu(tmp_path, SUBJECTS)


# ------------------------------------------------------------------------------------------------ the prompts


@pytest.mark.parametrize("subject", ["abstract_algebra", "high_school_us_history", "formal_logic"])
def test_prompts_are_lm_evals_own(lm_eval: Any, assets: Path, monkeypatch: pytest.MonkeyPatch, subject: str) -> None:
    """lm_eval's own task, given the hub's data set as `datasets` holds it, asks the same to the byte."""
    import datasets
    from lm_eval.tasks import TaskManager

    def from_the_hub(path: str, name: str) -> Any:
        assert (path, name) == ("cais/mmlu", subject)
        told = {split: rows(assets / "mmlu", name, split)[1:] for split in ("dev", "test")}
        make = datasets.Dataset.from_list
        return {
            split: make([{"question": r[0], "subject": name, "choices": r[1:5], "answer": int(r[5])} for r in of])
            for split, of in told.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    path = Path(sys.modules["lm_eval.tasks"].__file__ or "").parent / "mmlu" / "default"
    name = f"mmlu_{subject}"
    own = TaskManager(include_path=path, include_defaults=False).load([name])["tasks"][name]
    own.set_config("num_fewshot", 5)
    ours = mmlu_task(assets / "mmlu", None, None)
    assert isinstance(ours, HarnessTask)
    for task in (own, ours.tasks[name]):
        task.build_all_requests(limit=20)
    asked = [instance.args for instance in ours.tasks[name].instances]
    assert asked == [instance.args for instance in own.instances]
    assert len(asked) == 80
    assert asked[0][0].startswith("The following are multiple choice questions (with answers) about ")
    assert asked[0][0].count("\nAnswer:") == 6
    assert [continuation for _, continuation in asked[:4]] == [" A", " B", " C", " D"]


# ------------------------------------------------------------------------------------------------ the scores


@dataclass
class Run:
    task: HarnessTask
    scored: Scored
    steps: Steps


@pytest.fixture(scope="module", params=[0, 5])
def run(request: pytest.FixtureRequest, lm_eval: Any, folder: Path, model: Model) -> Run:
    """Without examples, prompts fit into the context of 512; with five, none does."""
    task, steps = mmlu_task(folder, None, request.param), Steps()
    assert isinstance(task, HarnessTask)
    return Run(task, task.score(model, steps, "dense"), steps)


def plain_loglikelihoods(directory: Path, tokenizer: Any, args: list[tuple[str, str]], length: int) -> list[float]:
    """What a plain forward says: the last `length` tokens in, the continuation's log-probabilities summed."""
    network = AutoModelForCausalLM.from_pretrained(directory)
    sums = []
    for context, continuation in args:
        whole, start = tokenizer.encode(context + continuation), tokenizer.encode(context)
        answer = whole[len(start) :]
        window = torch.tensor([whole[-(length + 1) :]])
        with torch.no_grad():
            logits = network(window[:, :-1]).logits[0].double().log_softmax(-1)
        sums.append(sum(logits[-len(answer) + i, token].item() for i, token in enumerate(answer)))
    return sums


def test_loglikelihoods(run: Run, model: Model, stories: Path) -> None:
    task = run.task.tasks["mmlu_anatomy"]
    instances = [instance for instance in task.instances if instance.doc_id < 3]
    expected = plain_loglikelihoods(stories, model.processor, [i.args for i in instances], 512)
    assert [i.resps[0][0] for i in instances] == pytest.approx(expected, abs=1e-4)
    correct = [
        float(max(range(4), key=expected[4 * n : 4 * n + 4].__getitem__) == task.eval_docs[n]["answer"])
        for n in range(3)
    ]
    assert run.scored.items["acc"][6:9] == correct  # anatomy is the second subject


def test_every_answer_is_scored_and_told(run: Run) -> None:
    values, items = run.scored.values, run.scored.items["acc"]
    assert json.loads(json.dumps(values)) == values
    assert list(values["subjects"]) == list(SUBJECTS)
    assert list(values["groups"]) == ["stem", "humanities"]
    assert [group["questions"] for group in values["groups"].values()] == [12, 6]
    assert len(items) == values["questions"] == 18
    assert set(items) <= {0.0, 1.0}
    assert values["acc"] == pytest.approx(sum(items) / 18)
    assert values["requests"] == 72
    assert values["truncated_requests"] == {0: 0, 5: 72}[values["num_fewshot"]]
    assert values["metric"] == "acc"
    assert values["lm_eval"]
    assert values["sha256"] == run.task.protocol["sha256"]
    total = values["requests"]
    assert run.steps.stages == [
        ["mmlu, dense, tokenizing inputs", total, total],
        ["mmlu, dense, loglikelihood requests", total, total],
    ]


def test_standard_errors(run: Run) -> None:
    """Of a subject: the binomial one, unbiased. Of more: pooled over the subjects' own means."""
    values, items = run.scored.values, run.scored.items["acc"]
    parts = {subject: items[6 * n : 6 * n + 6] for n, subject in enumerate(SUBJECTS)}
    means = {subject: sum(part) / 6 for subject, part in parts.items()}
    for subject, mean in means.items():
        assert values["subjects"][subject]["acc"] == pytest.approx(mean)
        assert values["subjects"][subject]["acc_stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 5))

    def pooled(*subjects: str) -> float:
        squares = sum((item - means[subject]) ** 2 for subject in subjects for item in parts[subject])
        count = 6 * len(subjects)
        return math.sqrt(squares / (count - len(subjects)) / count)

    assert values["groups"]["stem"]["acc_stderr"] == pytest.approx(pooled(*SUBJECTS[:2]))
    assert values["acc_stderr"] == pytest.approx(pooled(*SUBJECTS))


def test_nothing_is_said_and_nothing_stays_changed(
    lm_eval: Any, folder: Path, stories: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import tqdm
    from lm_eval.api import metrics, task

    bootstrap, logging_off = metrics.bootstrap_stderr, logging.root.manager.disable
    model = load(str(stories), device="cpu")
    padding = model.processor.pad_token
    capfd.readouterr()
    first = mmlu_task(folder, 2, None).score(model, Silent(), "dense")
    assert capfd.readouterr() == ("", "")
    assert task.tqdm is tqdm.tqdm
    assert metrics.bootstrap_stderr is bootstrap
    assert logging.root.manager.disable == logging_off
    assert "tie_weights" not in vars(model.network)
    assert model.processor.pad_token == padding
    assert all(p.is_meta for block in model.blocks for p in block.module.parameters())
    assert mmlu_task(folder, 2, None).score(model, Silent(), "again") == first


def test_one_question_a_subject_has_no_standard_error(lm_eval: Any, folder: Path, model: Model) -> None:
    values = mmlu_task(folder, 1, 0).score(model, Silent(), "dense").values
    assert values["questions"] == 3
    assert values["acc_stderr"] is None


def test_a_head_of_its_own_stays(lm_eval: Any, folder: Path, stories: Path) -> None:
    """The config says that head and embedding are one; the checkpoint may hold two, and lm_eval would tie them."""
    network: Any = (model := load(str(stories), device="cpu")).network
    network.lm_head.weight = nn.Parameter(torch.zeros_like(network.lm_head.weight), requires_grad=False)
    scored = mmlu_task(folder, 2, 0).score(model, Silent(), "dense")
    assert not network.lm_head.weight.any()
    assert network.model.embed_tokens.weight.any()
    # a head of zeros finds all tokens alike, and only " B" is a single one
    answers = [read_mmlu(folder, SUBJECTS)[subject]["test"][n]["answer"] for subject in SUBJECTS for n in range(2)]
    assert scored.items["acc"] == [float(answer == 1) for answer in answers]


def test_logits_that_are_not_finite(lm_eval: Any, folder: Path, stories: Path) -> None:
    network: Any = (model := load(str(stories), device="cpu")).network
    network.model.norm.weight.fill_(math.nan)
    with pytest.raises(ObspruneError, match="not finite"):
        mmlu_task(folder, 2, 0).score(model, Silent(), "dense")


def test_only_language_models_are_asked(lm_eval: Any, folder: Path) -> None:
    model: Any = SimpleNamespace(kind=SimpleNamespace(positional=False, name="image classifier"), directory="deit")
    with pytest.raises(InputError, match="asks a language model; deit is an image classifier"):
        mmlu_task(folder, 2, 0).score(model, Silent(), "dense")


@pytest.mark.slow
def test_all_subjects(lm_eval: Any, assets: Path, model: Model) -> None:
    scored = mmlu_task(assets / "mmlu", 5, None).score(model, Silent(), "dense")
    values = scored.values
    assert values["coverage"] == "57 of 57 subjects"
    assert values["questions"] == len(scored.items["acc"]) == 285
    assert {name: group["questions"] for name, group in values["groups"].items()} == {
        "stem": 95,
        "other": 65,
        "social_sciences": 60,
        "humanities": 65,
    }
    assert sum(subject["questions"] for subject in values["subjects"].values()) == 285
    assert abs(values["acc"] - 0.25) < 5 * values["acc_stderr"]
    assert 0.02 < values["acc_stderr"] < 0.03


# ------------------------------------------------------------------------------------------------ all other tasks

STORIES = [
    {"query": "Lily had a red", "options": ["ball", "of the"], "gold": 0, "text": "Lily had a red ball. She ran."},
    {"query": "Tom saw a big", "options": ["dog", "wanted"], "gold": 0, "text": "Tom saw a big dog."},
    {"query": "Mom said no, so Sue was", "options": ["table", "sad"], "gold": 1, "text": "Sue was sad. Mom was not."},
    {"query": "Ben went to the", "options": ["did", "park to play"], "gold": 1, "text": "Ben went to the park."},
]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
metadata: {{version: 3}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{options}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity}
  - {metric: word_perplexity}
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{options[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - name: first-word
    filter:
      - {function: regex, regex_pattern: "(\\\\w+)"}
      - {function: take_first}
"""


@pytest.fixture
def write(tmp_path: Path, lm_eval: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes a task of lm_eval with the four stories."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "stories.jsonl"
    data.write_text("".join(json.dumps(story) + "\n" for story in STORIES))

    def write(name: str, body: str) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(YAML.format(name=name, data=data) + body)
        return str(path)

    return write


def test_multiple_choice(write: Callable[[str, str], str], model: Model) -> None:
    task = harness_task(write("choice", CHOICE), None, None)
    scored = task.score(model, Silent(), "dense")
    values = scored.values
    assert task.metric == values["metric"] == "acc_norm"
    assert (values["questions"], values["num_fewshot"], values["version"]) == (4, 0, "3")
    assert set(values["metrics"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert len(scored.items["acc_norm"]) == 4
    assert values["acc_norm"] == pytest.approx(sum(scored.items["acc_norm"]) / 4)
    assert "groups" not in values
    assert task.protocol["sha256"] != harness_task(write("choice", CHOICE), 3, None).protocol["sha256"]


def test_random_examples_are_the_same_for_all_models(write: Callable[[str, str], str], model: Model) -> None:
    task = harness_task(write("choice", CHOICE), None, 2)
    assert isinstance(task, HarnessTask)
    asked = []
    for who in ("dense", "pruned"):
        task.score(model, Silent(), who)
        asked.append([instance.args for instance in task.tasks["choice"].instances])
    assert asked[0] == asked[1]
    assert asked[0][0][0].count("\n\n") == 2
    with pytest.raises(InputError, match="lm_eval cannot prepare"):
        harness_task(write("choice", CHOICE), None, 20)


def test_rolling_perplexity(write: Callable[[str, str], str], model: Model, stories: Path) -> None:
    steps = Steps()
    task = harness_task(write("rolling", ROLLING), None, None)
    scored = task.score(model, steps, "dense")
    texts = [story["text"] for story in STORIES]
    tokenizer, network = model.processor, AutoModelForCausalLM.from_pretrained(stories)
    nll = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            nll += nn.functional.cross_entropy(network(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum").item()
    words = sum(len(text.split()) for text in texts)
    assert scored.values["word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert scored.values["word_perplexity_stderr"] is None
    assert scored.items == {}
    assert [stage[1:] for stage in steps.stages] == [[4, 4]]


def test_generated_answers(write: Callable[[str, str], str], model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    scored = harness_task(write("generate", GENERATE), 3, None).score(model, Silent(), "dense")
    assert capfd.readouterr() == ("", "")
    assert len(scored.items["exact_match"]) == 3
    assert set(scored.values["metrics"]) == {"exact_match,first-word", "exact_match_stderr,first-word"}
    assert scored.values["exact_match"] == pytest.approx(sum(scored.items["exact_match"]) / 3)
    too_long = harness_task(write("long", GENERATE.replace("max_gen_toks: 8", "max_gen_toks: 600")), 3, None)
    with pytest.raises(InputError, match=r"lm_eval refuses this model: .*maximum sequence length"):
        too_long.score(model, Silent(), "dense")


def test_tasks_that_cannot_be_done(write: Callable[[str, str], str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="code that the model wrote"):
        harness_task(write("code", GENERATE + "unsafe_code: true\n"), None, None)
    with pytest.raises(InputError, match="defined without few-shot examples, and 3 are asked for"):
        harness_task(write("zero", CHOICE + "num_fewshot: 0\n"), None, 3)
    with pytest.raises(InputError, match="a limit of 0 leaves no question"):
        harness_task(write("choice", CHOICE), 0, None)
    with pytest.raises(InputError, match="lm_eval cannot prepare"):
        harness_task(write("broken", CHOICE.replace("gold", "{{nothing | nonsense}}")), None, None)


@pytest.fixture
def named(write: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval knows a group `both` of two tasks with a common score, and a tag `pair` of the same without one."""
    from lm_eval import tasks

    for name in ("both_one", "both_two"):
        write(name, CHOICE + "tag: pair\n")
    score = {"metric": "acc", "weight_by_size": True}
    group = {"group": "both", "task": ["both_one", "both_two"], "aggregate_metric_list": [score]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    own = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: own(include_path=tmp_path, include_defaults=False))


def test_a_group(named: None, model: Model) -> None:
    scored = harness_task("both", 3, None).score(model, Silent(), "dense")
    values, items = scored.values, scored.items["acc"]
    assert values["metric"] == "acc"  # all that the group has in common
    assert list(values["subjects"]) == ["one", "two"]
    assert values["subjects"]["one"]["acc"] == pytest.approx(sum(items[:3]) / 3)
    assert items[:3] == items[3:]
    assert (values["groups"], values["questions"], len(items)) == ({}, 6, 6)


def test_names(named: None) -> None:
    with pytest.raises(InputError, match=r"unknown task .both_on.; did you mean both_one.*`lm-eval ls tasks` lists"):
        harness_task("both_on", None, None)
    with pytest.raises(InputError, match="pair stands for tasks without a common score; name one of them: both_one, b"):
        harness_task("pair", None, None)


@pytest.mark.slow  # lm_eval reads all of its 10,000 tasks
def test_named_tasks(lm_eval: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"unknown task 'helaswag'; did you mean hellaswag.*lm-eval ls tasks"):
        harness_task("helaswag", None, None)
    with pytest.raises(InputError, match=r"cannot prepare hellaswag: Couldn't reach the Hub .*Hugging Face cache"):
        harness_task("hellaswag", None, None)


def test_mmlu_offline(lm_eval: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"cannot prepare mmlu: Couldn't reach the Hub .*--task mmlu=PATH"):
        mmlu_task(None, None, None)


def test_without_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for make in (lambda: mmlu_task(folder, None, None), lambda: harness_task("hellaswag", None, None)):
        with pytest.raises(InputError, match=r"needs lm_eval: pip install 'obsprune\[eval\]'"):
            make()
