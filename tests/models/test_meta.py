"""Meta's original layout: what is read is the Hugging Face model it was made from, and the result is one."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import torch
from shapes import HEADS, LLAMA2, LLAMA3, LLAMA31, WIDTH, twin, write_meta
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from zoo import logits, reference, shards, tensors, token_batches

from obsprune.engine.rundir import RunDir
from obsprune.errors import InputError
from obsprune.models.load import load
from obsprune.models.meta import META, Joined, Params
from obsprune.models.meta_tokenizer import special_tokens
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe

LAYOUTS = pytest.mark.parametrize(("parts", "embedding"), [(1, 1), (2, 1), (2, 0)])


@LAYOUTS
@pytest.mark.parametrize("params", [LLAMA2, LLAMA3, LLAMA31], ids=["2", "3", "3.1"])
def test_logits_are_those_of_the_twin(tmp_path: Path, params: dict[str, Any], parts: int, embedding: int) -> None:
    model = twin(params)
    ours, batch = load(str(write_meta(tmp_path / "meta", params, model, parts, embedding))), token_batches(1)[0]
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == {
        key: header.shape for key, header in ours.checkpoint.headers.items()
    }
    assert all(torch.equal(ours.checkpoint.read([key])[key], tensor) for key, tensor in model.state_dict().items())
    with ours.lazily_loaded():
        assert torch.equal(logits(ours.network, batch), logits(model, batch))


def test_attention_is_that_of_metas_own_rotation() -> None:
    """Meta turns neighbours as complex numbers (its apply_rotary_emb), transformers the halves of reordered rows."""
    torch.manual_seed(0)
    length, size = 7, WIDTH // HEADS
    x, wq, wk = (torch.randn(rows, WIDTH, dtype=torch.float64) for rows in (length, WIDTH, WIDTH))
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, size, 2) / size)).double()

    def metas(weight: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ weight.T).view(length, HEADS, -1, 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(2).transpose(0, 1)

    def heads(weight: Tensor) -> Tensor:
        ours = Joined("wq", (WIDTH, WIDTH), 0, HEADS).join([weight])
        return (x @ ours.T).view(1, length, HEADS, size).transpose(1, 2)

    whole = torch.cat([angles, angles], -1)[None]
    q, k = apply_rotary_pos_emb(heads(wq), heads(wk), whole.cos(), whole.sin())
    torch.testing.assert_close(q[0] @ k[0].mT, metas(wq) @ metas(wk).mT)


def test_a_head_that_is_not_stored_is_the_embedding(tmp_path: Path) -> None:
    model = twin(LLAMA31, tied=True)
    ours, batch = load(str(write_meta(tmp_path / "meta", LLAMA31, model))), token_batches(1)[0]
    assert "lm_head.weight" not in ours.checkpoint.headers and ours.config.tie_word_embeddings
    with ours.lazily_loaded():
        assert torch.equal(logits(ours.network, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"norm_eps": 1e-6}, 2048), ({}, 4096), ({"rope_theta": 5e5}, 8192), ({"rope_theta": 1e6}, 16384),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, 131072),
    ],
)  # fmt: skip
def test_the_longest_text(tmp_path: Path, changes: dict[str, Any], positions: int) -> None:
    (tmp_path / "params.json").write_text(json.dumps(LLAMA2 | changes))
    assert Params.read(tmp_path / "params.json").positions == positions


def test_without_kv_heads_there_are_as_many_as_heads(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps({k: v for k, v in LLAMA2.items() if k != "n_kv_heads"}))
    assert Params.read(tmp_path / "params.json").kv_heads == HEADS


# ------------------------------------------------------------------------------------------- from end to end


def settings(source: Path, tokens: Path) -> dict[str, Any]:
    data = {"dataset": str(tokens), "nsamples": 16, "seqlen": 32, "heldout": 8}
    return {"model": {"name": str(source)}, "data": data, "evaluation": ["heldout"], "solver": {"name": "sparsegpt"}}


def test_the_command_makes_a_hugging_face_checkpoint(tmp_path: Path, tokens: Path) -> None:
    model = twin(dtype=torch.bfloat16)
    source = write_meta(tmp_path / "meta", LLAMA2, model, parts=2)
    train_sentencepiece(source)
    (source / "LICENSE.txt").write_text("a licence")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    words = ["prune", str(source), "--sparsity", "0.5", "--solver", "sparsegpt", "--dataset", str(tokens), "--nsamples"]
    words += ["16", "--seqlen", "32", "--set", "data.heldout=8", "--iters", "2", "--eval", "heldout", "-o"]
    done = subprocess.run([sys.executable, "-m", "obsprune", *words, str(tmp_path / "out")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    out, dense = tensors(tmp_path / "out"), model.state_dict()
    assert {key: tensor.dtype for key, tensor in out.items()} == dict.fromkeys(dense, torch.bfloat16)
    for key, tensor in out.items():
        if "_proj" in key:
            assert int((tensor == 0).sum()) == tensor.numel() // 2
    assert torch.equal(out["lm_head.weight"], dense["lm_head.weight"])
    plain, report = reference(tmp_path / "out"), json.loads((tmp_path / "out/report.json").read_text())
    assert torch.isfinite(logits(plain, token_batches(1)[0])).all()
    assert report["evaluation"]["heldout"]["pruned"]["perplexity"] > 0
    assert (tmp_path / "out/LICENSE.txt").read_text() == "a licence"
    assert not [path for path in (tmp_path / "out").iterdir() if path.name in ("params.json", "consolidated.00.pth")]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the first")["input_ids"][0] == 1
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_same_bytes_as_the_twin_killed_or_not(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = twin()
    source = write_meta(tmp_path / "meta", LLAMA2, model)
    model.save_pretrained(tmp_path / "twin")
    commit, done = RunDir.commit, []

    def fragile(self: RunDir, block: str, *rest: Any, **facts: Any) -> None:
        if done:
            raise KeyboardInterrupt
        commit(self, block, *rest, **facts)
        done.append(block)

    recipe = make_recipe(settings(source, tokens))
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "commit", fragile)
        with pytest.raises(KeyboardInterrupt):
            prune(recipe, tmp_path / "out", Silent())
    assert len(done) == 1
    prune(recipe, tmp_path / "out", Silent())
    prune(make_recipe(settings(tmp_path / "twin", tokens)), tmp_path / "of-twin", Silent())
    assert shards(tmp_path / "out") == shards(tmp_path / "of-twin")


@pytest.mark.parametrize("file", ["params.json", "consolidated.00.pth"])
def test_a_run_is_of_one_version_of_the_files(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    source = write_meta(tmp_path / "meta", LLAMA2, twin())

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(make_recipe(settings(source, tokens)), tmp_path / "out", Silent())
    if file == "params.json":
        (source / file).write_text(json.dumps(LLAMA2 | {"norm_eps": 1e-4}))
    else:
        torch.save(torch.load(source / file) | {"rope.freqs": torch.ones(8)}, source / file)
    with pytest.raises(InputError, match=re.escape(file)):
        prune(make_recipe(settings(source, tokens)), tmp_path / "out", Silent())


def test_the_temporary_directory_lives_as_long_as_the_model(tmp_path: Path) -> None:
    model = load(str(write_meta(tmp_path / "meta", LLAMA2, twin())))
    side = model.checkpoint.directory
    assert (side / "config.json").is_file() and model.directory == tmp_path / "meta"
    del model
    assert not side.exists()


# ------------------------------------------------------------------------------------------- tokenizers

TEXT = ["The first  words of a text, in lines.\n", "Zahlen: 123 und 4567, naïve façade — 😀 ende", " led by a blank"]


def train_sentencepiece(directory: Path) -> sentencepiece.SentencePieceProcessor:
    """As Llama's was trained, on very little."""
    (directory / "corpus.txt").write_text("\n".join(f"the words of text {i} and its lines" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"), model_prefix=str(directory / "tokenizer"), vocab_size=310,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    for name in ("corpus.txt", "tokenizer.vocab"):
        (directory / name).unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def test_a_sentencepiece_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", LLAMA2, twin())
    theirs, ours = train_sentencepiece(source), load(str(source)).processor
    for text in [*TEXT, "the words of text", "a  b   c"]:
        assert ours(text)["input_ids"] == [1, *theirs.encode(text)]
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text
    assert (ours.bos_token_id, ours.eos_token_id, ours.model_max_length) == (1, 2, 4096)


@pytest.mark.parametrize(("params", "twelfth"), [(LLAMA3, "reserved_special_token_5"), (LLAMA31, "python_tag")])
def test_a_tiktoken_tokenizer_gives_the_same_ids(tmp_path: Path, params: dict[str, Any], twelfth: str) -> None:
    source = write_meta(tmp_path / "meta", params, twin(params))
    ranks = {bytes([value]): value for value in range(256)}
    for token in (b"th", b"the", b" w", b"or", b"ds", b" wor", b" words", b"12", b"123"):
        ranks[token] = len(ranks)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (source / "tokenizer.model").write_text("".join(lines))
    special = {name: len(ranks) + index for index, name in enumerate(special_tokens("use_scaled_rope" in params))}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    theirs = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    model = load(str(source))
    ours, begin = model.processor, special["<|begin_of_text|>"]
    for text in [*TEXT, "the words of text", "a  b   c"]:
        assert ours(text)["input_ids"] == [begin, *theirs.encode(text)]
    assert (len(special), len(ours), ours.bos_token_id) == (256, len(ranks) + 256, begin)
    assert ours.convert_ids_to_tokens(len(ranks) + 10) == f"<|{twelfth}|>"
    assert model.config.eos_token_id == ours.eos_token_id == begin + 1


def test_a_tokenizer_beside_the_folder_or_nowhere(tmp_path: Path) -> None:
    """Meta's download.sh puts one beside the folders of all sizes."""
    source = write_meta(tmp_path / "llama-2-7b", LLAMA2, twin())
    with pytest.raises(InputError) as caught:
        _ = load(str(source)).processor
    assert f"{source} has no usable tokenizer" in str(caught.value) and "--dataset" in str(caught.value)
    theirs = train_sentencepiece(tmp_path)
    assert load(str(source)).processor("the words")["input_ids"] == [1, *theirs.encode("the words")]


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", LLAMA2, twin())
    (source / "tokenizer.model").write_bytes(b"\x00\xffno tokenizer")
    refused(source, "tokenizer.model is no tokenizer of Meta's")


# ------------------------------------------------------------------------------------------- what is refused


def refused(path: Path, *says: str) -> None:
    with pytest.raises(InputError) as caught:
        load(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert all(phrase in message for phrase in says), message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps({k: v for k, v in LLAMA2.items() if k != "dim"}), "params.json does not say 'dim'"),
        (json.dumps(LLAMA2)[:-5], "params.json is damaged"),
        ("[]", "params.json is damaged"),
        (json.dumps(LLAMA2 | {"dim": "wide"}), "params.json is damaged"),
        (json.dumps(LLAMA2 | {"n_heads": 5}), "n_heads 5"),
        (json.dumps(LLAMA2 | {"n_heads": 0}), "n_heads 0"),
        (json.dumps(LLAMA2 | {"n_layers": 3}), "lacks layers.2.attention.wq.weight"),
        (json.dumps(LLAMA2 | {"n_layers": 1}), "holds layers.1.attention.wk.weight, which no Llama has"),
        (json.dumps(LLAMA2 | {"n_kv_heads": 4}), "layers.0.attention.wk.weight is (16, 32)"),
        (json.dumps(LLAMA2 | {"dim": 64}), "tok_embeddings.weight is (128, 32)"),
        (json.dumps(LLAMA2 | {"vocab_size": 127}), "vocab_size 127"),
        (json.dumps(LLAMA2 | {"sliding_window": 4096, "moe": {}}), "says moe, sliding_window"),
    ],
)  # fmt: skip
def test_bad_params(tmp_path: Path, text: str, says: str) -> None:
    source = write_meta(tmp_path / "meta", LLAMA2, twin())
    (source / "params.json").write_text(text)
    refused(source, says)


def test_bad_parts(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", LLAMA2, twin(), parts=2)
    first, second = source / "consolidated.00.pth", source / "consolidated.01.pth"
    stored = torch.load(second)
    for name, tensor, says in [
        ("layers.0.attention.wq.weight", torch.ones(3, WIDTH), "consolidated.01.pth: layers.0.attention.wq.weight is"),
        ("norm.weight", torch.ones(WIDTH, dtype=torch.float16), "torch.float16"),
        ("layers.0.feed_forward.experts", torch.ones(2), "holds layers.0.feed_forward.experts"),
    ]:
        torch.save(stored | {name: tensor}, second)
        refused(source, says)
    del stored["norm.weight"]
    torch.save(stored, second)
    refused(source, "consolidated.01.pth lacks norm.weight")
    second.rename(source / "consolidated.02.pth")
    refused(source, "lacks consolidated.01.pth")
    (source / "consolidated.02.pth").unlink()
    refused(source, "a part is missing")
    first.write_bytes(first.read_bytes()[:1000])
    refused(source, "consolidated.00.pth is truncated")
    torch.save({"norm.weight": torch.ones(WIDTH)}, first)
    refused(source, "has no matrix tok_embeddings.weight")
    first.unlink()
    refused(source, "lacks consolidated.00.pth")


def test_a_stray_params_file_changes_nothing(tmp_path: Path) -> None:
    """Mistral leaves its own beside a Hugging Face checkpoint."""
    twin().save_pretrained(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    assert not META.found(tmp_path)
    (tmp_path / "consolidated.00.pth").touch()
    assert load(str(tmp_path)).config.hidden_size == WIDTH
