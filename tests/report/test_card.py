"""README.md of a result: true, readable by the hub, and never markup of somebody else's making."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from zoo import Zoo, tokens_in

from obsprune import pipeline
from obsprune.models.kinds import KINDS
from obsprune.models.origin import licence, origin
from obsprune.progress import Silent
from obsprune.recipe import make_recipe
from obsprune.report import card
from obsprune.report.pathless import pathless, pathless_command, pathless_tree

CODE = "```python\n"
SHA = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = (
    "`*_[x](http://evil.com)|<script>alert(1)</script>\n---\nlicense: mine\n# big\n| a |\u202e www.evil.com &lt; ```"
)
Report = dict[str, Any]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the hub's cache holds it, pruned; its own card names a licence and says other things."""
    folder = tmp_path_factory.mktemp("card")
    source = folder / f"models--some-body--tiny_llama/snapshots/{SHA}"
    shutil.copytree(Zoo(folder)("llama"), source)
    (source / "README.md").write_text(
        "---\nlicense: llama2\nlicense_name: Llama\ntags: [x]\n---\n# Words of the source\n"
    )
    recipe = make_recipe({
        "model": {"name": str(source)},
        "data": {"dataset": str(tokens_in(folder)), "nsamples": 2, "heldout": 2},
        "pattern": "2:4",
        "evaluation": ["heldout"],
    })  # fmt: skip
    command = f"obsprune prune {source} --dataset '/home/some body/tokens' --token ***"
    pipeline.prune(recipe, folder / "out", Silent(), command=command)
    return folder / "out"


@pytest.fixture
def report(pruned: Path) -> Report:
    found: Report = json.loads((pruned / "report.json").read_text())
    return found


def tokens_of(text: str) -> Iterator[Token]:
    """What Markdown makes of a card without its front matter, as the hub reads it."""
    for token in MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text):
        yield token
        yield from token.children or []


def test_a_card_says_what_the_report_says(pruned: Path, report: Report) -> None:
    text = (pruned / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data == {
        "base_model": "some-body/tiny_llama",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "llama2",
        "license_name": "Llama",
        "tags": ["obsprune", "pruned", "sparse", "sparsegpt"],
    }
    assert "[some-body/tiny\\_llama](https://huggingface.co/some-body/tiny_llama) (revision 0123456789ab)" in text
    assert "# tiny\\_llama, 50 % sparse (2:4)" in text and "2:4: 2 kept of every 4 inputs" in text
    score = report["evaluation"]["heldout"]
    assert f"| {score['dense']['perplexity']:.4f} | {score['pruned']['perplexity']:.4f} |" in text
    assert score["dense"]["sha256"][:12] in text and report["data"]["sha256"][:12] in text
    assert f"{report['sparsity']['zeros']:,} of {report['sparsity']['weights']:,} weights" in text
    assert f"obsprune prune {SHA} --dataset tokens --token '***'" in text
    assert "Llama, as the dense model says" in text and "Words of the source" not in text
    assert str(pruned.parent) not in text and "/home" not in text


def test_a_card_tells_no_time(report: Report) -> None:
    before = card.make_card(report)
    later = report | {"seconds": {}, "memory": {}, "peak_memory_bytes": {}, "output": "elsewhere"}
    for pair in later["evaluation"].values():
        for score in (pair["dense"], pair["pruned"]):
            score["seconds"] = 12345
    assert card.make_card(later) == before and card.is_own(before, later)


def changed(tree: Any, path: list[str], value: str) -> Any:
    """A copy of a tree with another value, or key, at that path."""
    made = copy.deepcopy(tree)
    inside = made
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return made


PLACES = [["model", "source"], ["model", "kind"], ["command"], ["data", "dataset"], ["data", "unit"],
          ["versions", "torch"], ["skipped", "x"], ["recipe", "target"], ["sparsity", "pattern"],
          ["recipe", "solver", "damping"], ["recipe", "solver", "name"],
          ["evaluation", "heldout", "dense", "corpus"]]  # fmt: skip


@pytest.mark.parametrize("path", [*PLACES, ["warnings"], ["tasks"], ["licence"]], ids=".".join)
def test_hostile_texts_stay_text(report: Report, path: list[str]) -> None:
    report["model"]["base"] = None
    hostile = {
        "warnings": report | {"warnings": [HOSTILE, "- x", "# y", "/etc/<b>passwd</b>"]},
        "tasks": report | {"evaluation": {HOSTILE: report["evaluation"]["heldout"]}},
        "licence": changed(report, ["model", "licence"], {"license": "other", "license_name": HOSTILE}),  # type: ignore[arg-type]
    }
    held = hostile[path[0]] if path[0] in hostile else changed(report, path, HOSTILE)
    text = card.make_card(held)
    found = list(tokens_of(text))
    kinds = {token.type for token in found}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "strong_open", "hr"}, kinds
    heads = [token.markup for token in found if token.type == "heading_open"]
    assert heads == ["#", *["##"] * (6 - (path == ["model", "kind"]))]  # nobody knows how an unknown kind is loaded
    rows = "".join("r" if t.type == "tr_open" else "c" if t.type in ("td_open", "th_open") else "" for t in found)
    assert {len(row) for row in rows.split("r")[1:]} <= {2, 4}, rows  # as many cells as there are columns
    data, body = ModelCard(text).data.to_dict(), re.sub(r"(?s)\n(```+).*?\n\1", "", ModelCard(text).text)
    assert data.get("license") in ("llama2", "other") and data["library_name"] == "transformers"
    assert "evil.com" in text and "\u202e" not in text and "www.evil" not in body


def test_a_command_ends_no_code(report: Report) -> None:
    for command in ("```", "obsprune ```", "```\n# big"):
        assert [token.type for token in tokens_of(card.make_card(report | {"command": command}))].count("fence") == 2


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_is_loaded_by_its_class(report: Report, kind: Any) -> None:
    report["model"]["kind"] = kind.name
    code = card.make_card(report, "me/sparse").partition(CODE)[2].partition("```")[0]
    assert f'model = {kind.auto.__name__}.from_pretrained("me/sparse")' in code
    imported = code.splitlines()[0].removeprefix("from transformers import ").split(", ")
    transformers: Any = __import__("transformers")
    assert all(hasattr(transformers, name) for name in imported)


def test_packed_weights_need_the_import(report: Report) -> None:
    assert "`import obsprune` comes first" in card.make_card(report)
    assert "import obsprune" not in card.make_card(report, "me/sparse", packed=False)
    for text in (card.make_card(report, "me/sparse", packed=True), card.make_card(report | {"packed": {}})):
        assert text.partition(CODE)[2].startswith("import obsprune")


def test_other_commands_have_cards(report: Report) -> None:
    """Of `train-prune`, and of `finetune`, whose reports have a third score and no solver."""
    model, scores = report["recipe"]["model"], report["evaluation"]["heldout"]
    part = {"method": "woodfisher", "curvature": "none", "steps": 4, "epochs": 1}
    trained = card.make_card(report | {"recipe": {"model": model, "training": part}})
    assert "- woodfisher\n" in trained and "4, each with 1 epochs" in trained
    tuned = report | {
        "recipe": {"model": model, "tuning": {"teacher": "/home/me/dense", "steps": 300}},
        "evaluation": dict.fromkeys(["heldout", "text=/data/a b.txt"], scores | {"tuned": scores["dense"]}),
    }
    text = card.make_card(tuned)
    assert "| task | metric | dense | pruned | tuned |" in text and "| text=a b.txt |" in text
    assert "300 steps toward dense" in text and "- distilled\n" in text


@pytest.mark.parametrize(
    ("front", "told"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ("license: other\nlicense_name: mine", {"license": "other", "license_name": "mine"}),
        ("license: [a, b]", {}),
        ("license: 'a\\nb: c'", {}),
        ("license: {a: &x [1], b: *x}", {}),
        ("license: !!python/object/apply:os.system ['x']", {}),
        ("license: [", {}),
        ("[" * 500, {}),
        ("- a", {}),
        ("license: " + "x" * 2**20, {}),
    ],
)  # fmt: skip
def test_licences(tmp_path: Path, front: str, told: dict[str, str]) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\nwords")
    assert licence(tmp_path, object()) == told
    config = type("Config", (), {"license": "mit", "license_name": "no"})
    assert licence(tmp_path, config) == (told or {"license": "mit"})


def test_origins(tmp_path: Path) -> None:
    assert origin(Path(f"/c/models--a--b-c.d/snapshots/{SHA}")) == {"id": "a/b-c.d", "revision": SHA}
    for base, known in (
        ({"id": "a/b", "revision": SHA}, True),
        ({"id": "a/b](x)", "revision": SHA}, False),
        ("x", False),
    ):
        (tmp_path / "report.json").write_text(json.dumps({"model": {"base": base}}))
        assert origin(tmp_path) == (base if known else None)
    (tmp_path / "report.json").write_text("{")
    assert origin(tmp_path) is None
    for path in ("models--a--b", f"models--a--b](x)/snapshots/{SHA}", f"a--b/snapshots/{SHA}", "a/b"):
        assert origin(tmp_path / path) is None


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/data/some/x.txt", "x.txt"),
        ("text=/data/J. Doe/x.txt", "text=x.txt"),
        ("imagenet=/data/imgs/", "imagenet=imgs"),
        ("see https://hf.co/a/b and /srv/joe/models/llama: bad", "see https://hf.co/a/b and llama: bad"),
        ("file:///srv/joe/x", "x"),
        ("'/srv/joe/x', (/srv/y)", "'x', (y)"),
        ("~joe/models/x, 3/4 and a/b", "x, 3/4 and a/b"),
        (f"at {Path.home()}, and {Path.home()}/a/b", "at ~, and b"),
        ("../x/y", "../x/y"),
        ("12 / 7", "12 / 7"),
    ],
)  # fmt: skip
def test_paths_are_shortened(text: str, left: str) -> None:
    assert pathless(text) == left
    assert pathless_tree({text: [text, 3, None]}) == {left: [left, 3, None]}


def test_known_paths_with_spaces_are_shortened_in_sentences() -> None:
    tree = {
        "model": {"source": "/home/me/Acme Corp/demo"},
        "recipe": {"evaluation": ["text=/data/J Doe/a (1).txt"], "data": {"dataset": "~/My Data/ids.safetensors:x"}},
        "command": "obsprune prune '/home/me/Acme Corp/demo' -o out",
        "warnings": [
            "S1 comes from /home/me/Acme Corp/demo: --teacher /home/me/Acme Corp/demo distils",
            "/home/me/Acme Corp/demo/config.json and /home/me/Acme Corp/other.txt, in /home/me/Acme Corp",
            f"text=/data/J Doe/a (1).txt; {Path.home()}/My Data/ids.safetensors; ~/My Data/ids.safetensors",
            "/srv/joe/x: bad",
        ],
    }
    found = pathless_tree(tree)
    assert found["warnings"] == [
        "S1 comes from demo: --teacher demo distils",
        "config.json and other.txt, in Acme Corp",
        "text=a (1).txt; ids.safetensors; ids.safetensors",
        "x: bad",
    ]
    assert found["command"] == "obsprune prune demo -o out".replace("demo", "'demo'")
    assert found["model"]["source"] == "demo" and found["recipe"]["evaluation"] == ["text=a (1).txt"]
    assert found["recipe"]["data"]["dataset"] == "ids.safetensors:x"


def test_a_card_shows_no_folder_with_a_space(report: Report) -> None:
    report["model"] |= {"source": "/home/me/Acme Corp/demo", "base": None}
    report["command"] = "obsprune prune '/home/me/Acme Corp/demo'"
    text = card.make_card(report | {"warnings": ["S1 comes from /home/me/Acme Corp/demo"]})
    assert "- S1 comes from demo\n" in text and "obsprune prune demo\n" in text and "Acme" not in text


def test_paths_of_a_command_are_shortened() -> None:
    line = "obsprune prune '/srv/J Doe/m' -o /x/y --eval=text=/z.txt --set a=b 'not closed"
    assert pathless_command(line[:-12]) == "obsprune prune m -o y --eval=text=z.txt --set a=b"
    assert "/srv" not in pathless_command(line)
