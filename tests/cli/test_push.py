"""`obsprune push` and `--push-to-hub`, to a hub on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from driver import Cli
from fake_hub import READER, TOKEN, FakeHub, Repo
from huggingface_hub import ModelCard

RUN = ("prune", "demo", "--nsamples", "4", "--eval", "none", "--preset", "fast")
TO = ("--push-to-hub", "me/sparse", "--token", TOKEN)


@pytest.fixture
def result(pruned_demo: Path, tmp_path: Path) -> Path:
    """A finished result, with what may lie about in such a directory."""
    directory = Path(shutil.copytree(pruned_demo, tmp_path / "result"))
    (directory / ".secrets.json").write_text("{}")
    (directory / ".model.safetensors.partial").write_bytes(b"half")
    (directory / "notes.txt").write_text("mine")
    (directory / "rounds").mkdir()
    (directory / "rounds/trial.json").write_text("{}")
    return directory


def refused(cli: Cli, *words: object, says: list[str]) -> None:
    found = cli(*words)
    assert found.exit_code == 2, found.output
    lines = [line for line in found.stderr.splitlines() if not line.startswith(("note:", "["))]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in found.stderr, found.stderr
    assert all(phrase in lines[0] for phrase in says), lines[0]
    assert TOKEN not in found.output and READER not in found.output


def test_a_finished_result_goes_up(cli: Cli, result: Path, fake_hub: FakeHub) -> None:
    found = cli("push", result, "me/sparse", "--token", TOKEN)
    assert found.exit_code == 0, found.stderr
    assert found.stdout == f"{fake_hub.endpoint}/me/sparse\n" and "uploading to me/sparse" not in found.stdout
    sent = fake_hub.files("me/sparse")
    shards = {path.name: path.read_bytes() for path in result.glob("model-*.safetensors")}
    assert len(shards) == 5 and {name: sent[name] for name in shards} == shards
    side = {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"}
    pages = {"report.html", "report.md"}
    own = {"README.md", "recipe.yaml", "report.json", "tokenizer_config.json", ".gitattributes"}
    assert sent.keys() == shards.keys() | side | own | pages
    assert all(sent[name] == (result / name).read_bytes() for name in side)
    assert fake_hub.repos["me/sparse"].messages == ["demo, 50 % sparse, by sparsegpt (obsprune 0.1.0)"]
    assert not fake_hub.repos["me/sparse"].private
    card = sent["README.md"].decode()
    assert card.count('from_pretrained("me/sparse")') == 2 and "obsprune pack" not in card
    assert ModelCard(card).data.tags == ["obsprune", "pruned", "sparse", "sparsegpt"]


def test_no_place_on_this_machine_goes_up(cli: Cli, result: Path, fake_hub: FakeHub) -> None:
    told = json.loads((result / "report.json").read_text())
    assert told["output"].startswith("/")  # what is to be seen to go
    recipe = yaml.safe_load((result / "recipe.yaml").read_text())
    recipe["data"]["dataset"] = "/home/somebody/secret project/corpus.txt"
    (result / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (result / "tokenizer_config.json").write_text(json.dumps({"name_or_path": f"{Path.home()}/models/x"}))
    found = cli("push", result, "me/sparse", "--token", TOKEN)
    assert "note: tokenizer_config.json names a place in" in found.stderr
    sent = fake_hub.files("me/sparse")
    for name in ("README.md", "recipe.yaml", "report.json", "report.html", "report.md"):
        assert b"/home/" not in sent[name] and str(result.parent).encode() not in sent[name], name
        assert b"obsprune/demo" not in sent[name] and b"/pytest-" not in sent[name]
    assert json.loads(sent["report.json"])["output"] == told["output"].rpartition("/")[2]
    assert yaml.safe_load(sent["recipe.yaml"]) == recipe | {"data": recipe["data"] | {"dataset": "corpus.txt"}}
    assert json.loads((result / "report.json").read_text()) == told


def test_what_somebody_has_written_into_the_card_stays(cli: Cli, result: Path, fake_hub: FakeHub) -> None:
    (result / "README.md").write_text((result / "README.md").read_text() + "\nMy words.\n")
    assert cli("push", result, "me/sparse", "--token", TOKEN).exit_code == 0
    assert fake_hub.files("me/sparse")["README.md"] == (result / "README.md").read_bytes()


def test_packed_takes_the_place_of_dense(cli: Cli, result: Path, tmp_path: Path, fake_hub: FakeHub) -> None:
    """A loader must not find the former weights beside the new ones."""
    assert cli("pack", result, "-o", "small", "-q").exit_code == 0
    assert cli("push", result, "me/sparse", "--token", TOKEN, "-q").exit_code == 0
    fake_hub.files("me/sparse")["notes.md"] = b"of somebody else"
    found = cli("push", "small", "me/sparse", "--token", TOKEN, "--json")
    sent, told = fake_hub.files("me/sparse"), json.loads(found.stdout)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "small").glob("obsprune*.safetensors*")}
    assert {name: held for name, held in sent.items() if "safetensors" in name} == shards and len(shards) == 6
    assert "notes.md" in sent and found.stderr == "" and shards.keys() < set(told["files"])
    assert "import obsprune  # pip install obsprune" in sent["README.md"].decode()


def test_a_branch_and_a_private_repository(cli: Cli, result: Path, fake_hub: FakeHub) -> None:
    found = cli("push", result, "me/sparse", "--private", "--revision", "half", "--token", TOKEN, "-q")
    assert found.stdout == f"{fake_hub.endpoint}/me/sparse/tree/half\n", found.stderr
    assert fake_hub.repos["me/sparse"].private and "README.md" not in fake_hub.files("me/sparse")
    assert "README.md" in fake_hub.files("me/sparse", "half")
    fake_hub.repos["me/open"] = Repo(private=False)
    refused(cli, "push", result, "me/open", "--private", "--token", TOKEN, says=["me/open is there and public"])
    assert fake_hub.files("me/open").keys() == {".gitattributes"}


def test_what_was_sent_is_not_sent_again(cli: Cli, result: Path, fake_hub: FakeHub) -> None:
    words = ("push", result, "me/sparse", "--token", TOKEN)
    fake_hub.failing["/commit/"] = 500
    refused(cli, *words, says=["the hub does not take me/sparse", "500"])
    stored = [asked for asked in fake_hub.asked if asked.startswith("PUT")]
    fake_hub.failing.clear()
    assert cli(*words).exit_code == 0
    assert len(stored) == 5 == sum(asked.startswith("PUT") for asked in fake_hub.asked)


def test_refusals_of_the_hub(cli: Cli, result: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.repos["you/theirs"] = Repo(private=False)
    refused(cli, "push", result, "me/x", says=["there is no access token", "hf auth login"])
    refused(cli, "push", result, "me/x", "--token", "hf_someOtherToken", says=["(401)", "--token"])
    refused(cli, "push", result, "me/x", "--token", READER, says=["may not write to me/x (403)"])
    refused(cli, "push", result, "you/new", "--token", TOKEN, says=["may not write to you/new (403)"])
    refused(cli, "push", result, "you/theirs", "--token", TOKEN, says=["may not write to you/theirs (403)"])
    refused(cli, "push", result, "sparse", "--token", TOKEN, says=["'sparse' is no repository", "OWNER/NAME"])
    refused(cli, "push", result, "me/a b", "--token", TOKEN, says=["'me/a b' is no repository"])
    refused(cli, "push", result, "me/x", "--token", f"{TOKEN}\nand more", says=["Bearer ***"])
    assert fake_hub.objects == {}
    fake_hub.failing["/storage/"] = 403
    refused(cli, "push", result, "me/x", "--token", TOKEN, says=["may not write to me/x (403)"])
    fake_hub.failing.clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(cli, "push", result, "me/x", "--token", TOKEN, says=["the hub cannot be reached"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(cli, "push", result, "me/x", "--token", TOKEN, says=["the hub cannot be reached", "HF_HUB_OFFLINE"])


def test_what_is_no_finished_result_is_refused(cli: Cli, result: Path, tmp_path: Path, fake_hub: FakeHub) -> None:
    words = ("me/x", "--token", TOKEN)
    refused(cli, "push", "nowhere", *words, says=["there is no directory nowhere"])
    (tmp_path / "empty").mkdir()
    refused(cli, "push", "empty", *words, says=["has no report.json", "not finished"])
    journal = result / "progress.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    refused(cli, "push", result, *words, says=["holds an unfinished run", "repeat the command"])
    journal.unlink()
    (tmp_path / "elsewhere").write_text("private")
    (result / "README.md").unlink()
    (result / "README.md").symlink_to(tmp_path / "elsewhere")
    refused(cli, "push", result, *words, says=["README.md is a link"])
    (result / "README.md").unlink()
    next(result.glob("model-00003*")).unlink()
    refused(cli, "push", result, *words, says=["lacks 'model-00003"])
    assert fake_hub.asked == []


def test_prune_uploads_its_result(cli: Cli, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*RUN, "-o", "out", *TO, "--private"]
    monkeypatch.setattr("sys.argv", ["obsprune", *words])
    found = cli(*words)
    assert found.exit_code == 0 and found.stdout == "out\n", found.stderr
    assert found.stderr.splitlines()[-1] == f"uploaded to {fake_hub.endpoint}/me/sparse"
    sent = fake_hub.files("me/sparse")
    for path in Path("out").glob("*.safetensors"):
        assert sent[path.name] == path.read_bytes()
    assert fake_hub.repos["me/sparse"].private and not any(TOKEN.encode() in held for held in sent.values())
    assert b"--token" in sent["README.md"]


def test_no_hour_is_lost(cli: Cli, fake_hub: FakeHub, tmp_path: Path) -> None:
    """The right to write is asked for before anything else is done."""
    refused(cli, *RUN, "--push-to-hub", "you/x", "--token", TOKEN, says=["may not write to you/x (403)"])
    refused(cli, *RUN, "--push-to-hub", "me/x", "--token", READER, says=["(403)"])
    refused(cli, *RUN, "--push-to-hub", "me/x", says=["there is no access token"])
    refused(cli, *RUN, "--private", says=["add --push-to-hub"])
    refused(cli, "prune", "me/sparse", *RUN[2:], *TO, says=["me/sparse is the dense model itself", "--revision"])
    assert list(tmp_path.iterdir()) == [] and fake_hub.repos == {}


def test_a_failed_upload_keeps_the_result(cli: Cli, fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.failing["/commit/"] = 403
    refused(cli, *RUN, "-q", "-o", "out put", *TO, says=["(403)", "obsprune push 'out put' me/sparse"])
    assert '"kind": "end"' in (tmp_path / "out put/progress.jsonl").read_text()
    fake_hub.failing.clear()
    assert cli("push", "out put", "me/sparse", "--token", TOKEN).exit_code == 0
    assert "model.safetensors.index.json" in fake_hub.files("me/sparse")


def test_a_dry_run_asks_nobody(cli: Cli, fake_hub: FakeHub) -> None:
    assert cli(*RUN, "--dry-run", *TO).exit_code == 0
    assert fake_hub.asked == []
