"""Checkpoints, data and recipes made by somebody who means harm, or damaged on the way: nothing of theirs is run, one
clear error, nothing half-done that loads.
"""

from __future__ import annotations

import json
import shutil
import struct
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from damage import QUICK, SUBJECTS, Whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result
from zoo import Zoo

from obsprune.cli import app
from obsprune.errors import InputError
from obsprune.models.checkpoint import Checkpoint, copy_side_files
from obsprune.trees import parse_setting, read_recipe

TRAP = "from pathlib import Path\nPath({marker!r}).touch()\n"
"""A module that leaves a mark when it is imported."""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OBSPRUNE_DEBUG", raising=False)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / ".modules"))


def cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: object, says: str) -> str:
    """The command ends with code 2 and one line; returns the line."""
    result = cli(*words)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert line.startswith("error: ") and says in line, line
    return line


def copy_of(source: Path | str, name: str = "model") -> Path:
    return Path(shutil.copytree(source, name))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------ code


def trapped(model: Path, file: str, kind: str, **changes: Any) -> Path:
    """Adds a module to a checkpoint, names it in a config as what makes `kind`; returns the mark it leaves when run."""
    marker = Path("harmed").absolute()
    (model / "trap.py").write_text(TRAP.format(marker=str(marker)) + "class Trap: pass\n")
    edit(model / file, auto_map={kind: "trap.Trap"}, **changes)
    return marker


@pytest.mark.parametrize("command", [("prune",), ("prune", "--dry-run"), ("eval", "--task", "heldout"), ("inspect",)])
@pytest.mark.parametrize("kind", ["AutoConfig", "AutoModelForCausalLM"])
def test_code_of_a_model_is_not_run_unasked(zoo: Zoo, tokens: Path, command: tuple[str, ...], kind: str) -> None:
    marker = trapped(copy_of(zoo("llama")), "config.json", kind, model_type="unheard-of")
    data = ("--dataset", tokens) if command[0] == "prune" else ()
    refused(command[0], "model", *command[1:], *data, says="model/config.json cannot be used")
    assert not marker.exists()


def test_code_of_a_model_is_run_when_asked(zoo: Zoo, tokens: Path) -> None:
    """Without this the tests above and below would hold for a trap that does not work."""
    marker = trapped(copy_of(zoo("llama")), "config.json", "AutoConfig", model_type="unheard-of")
    cli("prune", "model", "--dataset", tokens, "--dry-run", "--trust-remote-code")
    assert marker.exists()


def test_code_of_a_known_architecture_is_not_run_either(zoo: Zoo, tokens: Path) -> None:
    model = copy_of(zoo("llama"))
    marker = trapped(model, "config.json", "AutoConfig")
    edit(model / "config.json", auto_map={"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"})
    assert cli("prune", "model", "--dataset", tokens, *QUICK, "out").exit_code == 0
    assert not marker.exists()


def test_code_of_a_tokenizer_is_not_run_unasked() -> None:
    model = copy_of(str(files("obsprune") / "demo"))
    marker = trapped(model, "tokenizer_config.json", "AutoTokenizer", tokenizer_class="TrapTokenizer")
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.Trap", None]})
    words = ("prune", "model", "--dataset", "model/calibration.txt", "--dry-run")
    assert cli(*words).exit_code in (0, 2)
    assert not marker.exists()
    cli(*words, "--trust-remote-code")
    assert marker.exists()


def test_code_of_an_image_processor_is_not_run_unasked(zoo: Zoo, pictures: Path) -> None:
    model = copy_of(zoo("vit"))
    (model / "preprocessor_config.json").write_text("{}")
    marker = trapped(model, "preprocessor_config.json", "AutoImageProcessor", image_processor_type="TrapProcessor")
    words = ("prune", "model", "--dataset", f"imagenet={pictures}", "--dry-run")
    refused(*words, says="no usable image processor")  # and nobody is asked on stdin
    assert not marker.exists()
    cli(*words, "--trust-remote-code")
    assert marker.exists()


def test_a_task_that_a_checkpoint_names_is_not_run(zoo: Zoo, tokens: Path) -> None:
    """A file of lm_eval's may call functions of a module beside it."""
    assert cli("prune", zoo("llama"), "--dataset", tokens, *QUICK, "out").exit_code == 0
    marker = Path("harmed").absolute()
    Path("out/trap.py").write_text(TRAP.format(marker=str(marker)) + "def load(**_): return {}\n")
    Path("out/task.yaml").write_text("task: trap\ncustom_dataset: !function trap.load\noutput_type: loglikelihood\n")
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text()) | {"evaluation": ["out/task.yaml"]}
    Path("out/recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused("eval", "out", says="may run code")
    assert not marker.exists()
    cli("eval", "out", "--task", "out/task.yaml")
    assert marker.exists()  # named by the user, it is


def test_scripts_of_data_sets_are_not_run(zoo: Zoo) -> None:
    marker = Path("harmed").absolute()
    Path("trap").mkdir()
    for path in ("trap/trap.py", "other.py"):
        Path(path).write_text(TRAP.format(marker=str(marker)))
    for source in ("trap", "trap/trap.py", "other.py", "other"):
        refused("prune", zoo("vit"), "--dataset", f"imagenet={source}", says=source)
        refused("prune", "demo", "--dataset", source, says=source)
    assert not marker.exists()


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed").absolute(),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_not_run(zoo: Zoo, tokens: Path, zipped: bool) -> None:
    model = copy_of(zoo("llama"))
    stored: dict[str, Any] = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(stored | {"more": Harmful()}, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused("prune", "model", "--dataset", tokens, says="holds Python objects")
    assert not Path("harmed").exists()


# ------------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE", "modeling_x.py", "chat_template.jinja"]
)
def test_links_out_of_a_checkpoint_are_refused(zoo: Zoo, tokens: Path, name: str) -> None:
    model, secret = copy_of(zoo("llama")), Path("secret").absolute()
    secret.write_text("for nobody else")
    if (model / name).exists():
        secret.write_bytes((model / name).read_bytes())
        (model / name).unlink()
    (model / name).symlink_to(secret)
    for command in (("prune", "model", "--dataset", tokens, *QUICK, "out"), ("inspect", "model")):
        said = refused(*command, says=f"model/{name} is a link to {secret}")
        assert "put the file itself there" in said
    assert not Path("out").exists()


def test_a_link_that_comes_later_is_not_copied_either(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="is a link to"):
        copy_side_files(tmp_path, tmp_path / "out")


def test_links_of_an_index_and_its_shards(whole: Whole, tokens: Path) -> None:
    for name in ("model.safetensors.index.json", min(path.name for path in whole.sharded.glob("*.safetensors"))):
        model = copy_of(whole.sharded, name.partition(".")[0])
        (model / name).unlink()
        (model / name).symlink_to(whole.sharded / name)
        refused("prune", model, "--dataset", tokens, says=f"{name} is a link to")


def test_links_inside_a_checkpoint_are_its_own(zoo: Zoo) -> None:
    model = copy_of(zoo("llama"))
    (model / "weights").mkdir()
    (model / "model.safetensors").rename(model / "weights/all")
    (model / "model.safetensors").symlink_to("weights/all")
    Path("elsewhere").symlink_to(model)  # and so is one to all of it
    assert Checkpoint.open(Path("elsewhere")).headers == Checkpoint.open(zoo("llama")).headers


def cached(source: Path) -> Path:
    """A checkpoint as the cache of the Hugging Face hub has it."""
    repository = Path("hub/models--someone--llama")
    snapshot = repository / "snapshots/0123abc"
    for folder in (repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, repository / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_cache_of_the_hub_is_made_of_links(zoo: Zoo, tokens: Path) -> None:
    snapshot = cached(zoo("llama"))
    Path("shortcut").symlink_to(Path("hub").absolute())
    for path in (snapshot, "shortcut" / snapshot.relative_to("hub")):
        assert cli("prune", path, "--dataset", tokens, *QUICK, "out", "--force").exit_code == 0
        made = [file for file in Path("out").iterdir() if file.is_symlink()]
        assert made == []


def test_links_out_of_the_cache_are_refused(zoo: Zoo) -> None:
    snapshot = cached(zoo("llama"))
    Path("secret").touch()
    (snapshot / "LICENSE").symlink_to("../../../../secret")
    refused("inspect", snapshot, says="LICENSE is a link to")
    (snapshot / "LICENSE").unlink()
    (snapshot.parents[1] / "blobs").rename("moved")  # blobs that are themselves elsewhere are somebody else's
    (snapshot.parents[1] / "blobs").symlink_to(Path("moved").absolute())
    refused("inspect", snapshot, says="is a link to")


# ------------------------------------------------------------------------------------------------ weights


def packed(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A safetensors file; header: its JSON, or the text of it; length: what it says of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def told(shape: list[int], start: int = 0, end: int = 8, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


A = {"a": told([2])}
HEADERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "header too small"),
    "a length of terabytes": (packed(A, length=2**42), "header too large"),
    "the longest length": (packed(A, length=2**64 - 1), "header too large"),
    "a length beyond the file": (packed(A, length=90_000_000), "invalid header length"),
    "a negative size": (packed({"a": told([-2])}), "expected usize"),
    "sizes whose product wraps": (packed({"a": told([2**62, 4, 2])}), "overflow"),
    "a size of more than is there": (packed({"a": told([3])}), "invalid shape"),
    "data beyond the end": (packed(A, bytes(4)), "not fully covered"),
    "data that nobody names": (packed(A, bytes(80)), "not fully covered"),
    "tensors that overlap": (packed({"a": told([2]), "b": told([2], 4, 12)}, bytes(12)), "invalid offset"),
    "two tensors in one place": (packed({"a": told([2]), "b": told([2])}), "invalid offset"),
    "a hole": (packed({"a": told([2]), "b": told([2], 16, 24)}, bytes(24)), "invalid offset"),
    "an end before the start": (packed({"a": told([2], 8, 0)}), "invalid offset"),
    "a name twice": (packed(b'{"a": %b, "a": %b}' % ((json.dumps(told([2])).encode(),) * 2)), "says 'a' twice"),
    "deep nesting": (packed(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "recursion limit"),
    "a list": (packed([]), "invalid type: sequence"),
    "no JSON": (packed(b"hello"), "invalid JSON"),
    "no text": (packed(b'{"\xff": {}}'), "UTF-8"),
    "an unknown dtype": (packed({"a": told([2], dtype="Q9")}), "unknown variant"),
    "a dtype of 8 bits": (packed({"a": told([8], dtype="F8_E4M3")}), "use an unquantised checkpoint"),
    "a dtype of 4 bits": (packed({"a": told([16], dtype="F4")}), "use an unquantised checkpoint"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_impossible_headers_are_refused(tmp_path: Path, name: str) -> None:
    """Most by safetensors itself: this holds it to that."""
    content, says = HEADERS[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors") as caught:
        Checkpoint.open(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_cannot_say_more_than_it_has(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(2**40)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="more than the file has"):
        Checkpoint.open(tmp_path)
    torch.save({"a": torch.ones(2, device="meta")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no table of tensors"):
        Checkpoint.open(tmp_path)


OUTSIDE = ["../x", "/etc/passwd", "a/../../b", "a\\..\\b", "..", "a\0b", "", "a/b.safetensors"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_shards_outside_the_checkpoint(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"which is outside|lacks"):
        Checkpoint.open(tmp_path)


def indexed(folder: Path, weight_map: Any) -> None:
    for number in (1, 2):
        save_file({f"{number}": torch.ones(2), "both": torch.ones(2)}, folder / f"model-{number}.safetensors")
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


ONE, TWO = "model-1.safetensors", "model-2.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"1": ONE, "2": TWO}, "both is in model-1.safetensors and in"),
        ({"1": ONE, "more": ONE}, "lacks more, which the index says it holds"),
        ({"2": ONE}, "lacks 2"),
        ('{"weight_map": {"1": "model-1.safetensors", "1": "model-2.safetensors"}}', "says '1' twice"),
        ("[" * 10**5, "nested too deeply"),
        ("[]", "is not a safetensors index"),
        ('{"weight_map": []}', "is not a safetensors index"),
        ('{"weight_map": {"1": null}}', "lacks 'None'"),
        ("", "is not a safetensors index"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path: Path, weight_map: Any, says: str) -> None:
    indexed(tmp_path, weight_map)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(tmp_path)
    assert says in str(caught.value)


def test_json_of_any_size_is_not_read(tmp_path: Path) -> None:
    indexed(tmp_path, {"1": ONE})
    with (tmp_path / "model.safetensors.index.json").open("ab") as file:
        file.truncate(2**27)
    with pytest.raises(InputError, match="134,217,728 bytes"):
        Checkpoint.open(tmp_path)


# ------------------------------------------------------------------------------------------------ quantised, impossible


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
)
def test_quantised_configs(zoo: Zoo, tokens: Path, changes: dict[str, Any]) -> None:
    edit(copy_of(zoo("llama")) / "config.json", **changes)
    refused("prune", "model", "--dataset", tokens, says="model is quantised; prune the unquantised checkpoint")


@pytest.mark.parametrize(
    "name",
    [
        *("qweight", "qzeros", "g_idx", "SCB", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"),
        *("weight_packed", "weight_scale", "weight_scale_inv"),
    ],
)
def test_quantised_tensors(zoo: Zoo, tokens: Path, name: str) -> None:
    """Of a checkpoint whose config does not say so, as the older ones."""
    model, full = copy_of(zoo("llama")), f"model.layers.0.mlp.up_proj.{name}"
    stored = load_file(model / "model.safetensors") | {full: torch.ones(4, dtype=torch.int32)}
    save_file(stored, model / "model.safetensors")
    assert full in refused("prune", "model", "--dataset", tokens, says="is quantised")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2**31},
        {"num_hidden_layers": -1},
        {"vocab_size": 2**40},
        {"vocab_size": -1},
        {"hidden_size": 0},
        {"hidden_act": "x"},
        {"architectures": 3},
        {"architectures": [1]},
        {"auto_map": "x"},
        {"model_type": []},
        {"rope_parameters": [1]},
    ],
)
def test_impossible_configs(zoo: Zoo, tokens: Path, changes: dict[str, Any]) -> None:
    edit(copy_of(zoo("llama")) / "config.json", **changes)
    refused("prune", "model", "--dataset", tokens, *QUICK, "out", says="")
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("!!python/object/apply:os.system ['touch harmed']", "could not determine a constructor"),
        ("model: !!python/name:os.system", "could not determine a constructor"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nskip: [*b, *b]", "the alias *a"),
        ("a: &a [*a]", "the alias *a"),
        ("a: " + "[" * 10**5, "nested more than"),
        ("{a: " * 10**4, "nested more than"),
        ("seed: " + "9" * 5000, "is not YAML"),
        ("seed: 2001-13-45", "is not YAML"),
        ("seed: !!bool x", "is not YAML"),
        ("#" * 2**21, "no recipe: it has 2,097,152 bytes"),
    ],
)
def test_hostile_recipes(text: str, says: str) -> None:
    path = Path("recipe.yaml")
    path.write_text(text)
    refused("prune", "demo", "--config", path, says=says)
    assert not Path("harmed").exists()


def test_hostile_settings() -> None:
    for value in ("!!python/object/apply:os.system ['touch harmed']", "&a [*a]", "[" * 1000, "2001-13-45"):
        with pytest.raises(InputError, match="the value is not YAML"):
            parse_setting(f"seed={value}")
    assert not Path("harmed").exists()


def test_recipes_of_a_result_have_no_alias(zoo: Zoo, tokens: Path) -> None:
    words = ("--skip", "o_proj", "--eval", "none", "-o", "out", "--nsamples", "1", "--seqlen", "8")
    assert cli("prune", zoo("llama"), "--dataset", tokens, *words, "--set", "data.heldout=1").exit_code == 0
    assert read_recipe(Path("out/recipe.yaml"))["skip"] == ["o_proj"]


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", b'{"text": "x", "a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "line 1 is nested"),
        ("t.json", b'[{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}]", "recursion"),
        ("t.json", b'[{"text": ' + b"[" * 200 + b"]" * 200 + b"}]", "no list of objects"),
        ("t.jsonl", b'null\n{"text": "a"}', "begins with neither"),
        ("t.jsonl", b'{"text": "a"}\nnull\n', "line 2 begins with null"),
        ("t.json", b'[null, {"text": "a"}]', "no list of objects"),
        ("t.jsonl", b"\x1f\x8b\x08\x00", "begins with neither"),
        ("t.csv", b"PK\x03\x04\x00\x00", "it is no text"),
        ("t.parquet", b"PK\x03\x04", "does not begin"),
    ],
)
def test_tables_that_would_end_the_process(name: str, content: bytes, says: str) -> None:
    """pyarrow dies (SIGSEGV) of some of them, and `datasets` unpacks archives whatever they are called."""
    Path(name).write_bytes(content)
    refused("prune", "demo", "--dataset", name, says=says)


def test_brackets_in_a_text_are_no_nesting() -> None:
    rows = [{"text": 'Mia said \\"[{' * 300} for _ in range(3)]
    Path("t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Path("a[1].json").write_text(json.dumps(rows))
    for name in ("t.jsonl", "a[1].json"):
        assert cli("prune", "demo", "--dataset", name, *QUICK, "out", "--dry-run").exit_code == 0


# ------------------------------------------------------------------------------------------------ whatever is damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("damage")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        yield Whole(root / "whole")


SETTINGS: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.parametrize("name", SUBJECTS)
@settings(max_examples=5, **SETTINGS)
@given(data=st.data())
def test_damage_is_refused_or_does_no_harm(whole: Whole, name: str, data: st.DataObject) -> None:
    damaged(whole, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
@settings(max_examples=8, **SETTINGS)
@given(data=st.data())
def test_much_damage_is_refused_or_does_no_harm(whole: Whole, name: str, data: st.DataObject) -> None:
    damaged(whole, name, data)


def damaged(whole: Whole, name: str, data: st.DataObject) -> None:
    """One case of one kind of input; a crash, two errors, or a result beside an error are what fails it."""
    if name not in whole.made:
        whole.made[name] = SUBJECTS[name](whole)
    subject = whole.made[name]
    assert subject.verdict(data.draw(subject.cases)) in ("refused", "same", "other")
