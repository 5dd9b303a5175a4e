"""Meta's original layout of Llama (params.json, consolidated.NN.pth, tokenizer.model) as a Hugging Face checkpoint.

Nothing is converted on disk: a tensor is joined from its parts when it is read. Config and tokenizer, which
transformers wants in a directory, are written to a temporary one that lives as long as the checkpoint.

Source of names, dimensions and the order of rotary halves: Meta's model.py (github.com/meta-llama/llama, llama3) and
transformers' convert_llama_weights_to_hf.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from torch import Tensor
from transformers import LlamaConfig

from obsprune.errors import InputError
from obsprune.models.caution import read_json, refuse_links
from obsprune.models.checkpoint import CONFIG, Checkpoint
from obsprune.models.files import PICKLED, Header, Layout
from obsprune.models.meta_tokenizer import TOKENIZER, convert_tokenizer

PARAMS = "params.json"
LICENCES = ("LICENSE*", "NOTICE*")
KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta", "use_scaled_rope", "vocab_size"),
    *("multiple_of", "ffn_dim_multiplier", "max_seq_len", "max_batch_size"),
}
"""What a Llama's params.json may say. Something else (a sliding window, experts, an image encoder) is no Llama."""
ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Params:
    """What params.json says of a Llama."""

    path: Path
    dim: int
    n_layers: int
    n_heads: int
    kv_heads: int
    norm_eps: float
    vocabulary: int
    rope_theta: float
    scaled: bool

    @classmethod
    def read(cls, path: Path) -> Params:
        """Raises InputError when the file is damaged, is another model's, or lacks a size."""
        try:
            told = read_json(path)
            strange = sorted(told.keys() - KNOWN)
        except AttributeError as error:
            raise InputError(f"{path} is damaged ({error}); download it again") from error
        if strange:
            raise InputError(f"{path} says {', '.join(strange)}, which no Llama has; use the Hugging Face version")
        try:
            heads = int(told["n_heads"])
            params = cls(
                path, int(told["dim"]), int(told["n_layers"]), heads, int(told.get("n_kv_heads") or heads),
                float(told["norm_eps"]), int(told.get("vocab_size", -1)), float(told.get("rope_theta", 1e4)),
                bool(told.get("use_scaled_rope")),
            )  # fmt: skip
        except KeyError as error:
            raise InputError(f"{path} does not say {error}; download it again") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path} is damaged ({error}); download it again") from error
        return params._checked()

    def _checked(self) -> Params:
        sizes = self.dim, self.n_layers, self.n_heads, self.kv_heads
        if min(sizes) < 1 or self.dim % (2 * self.n_heads) or self.n_heads % self.kv_heads:
            raise InputError(
                f"{self.path}: dim {self.dim}, n_layers {self.n_layers}, n_heads {self.n_heads}, n_kv_heads "
                f"{self.kv_heads} are no sizes of a Llama; download it again"
            )
        return self

    @property
    def kv_rows(self) -> int:
        return self.kv_heads * self.dim // self.n_heads

    @property
    def positions(self) -> int:
        """The longest text it was trained on, which the file does not say. From the model cards: Llama 3.1 and later
        (scaled rotary frequencies) 131072, Llama 3 (θ 500000) 8192, Code Llama (θ 10⁶) 16384, Llama 1 (ε 10⁻⁶) 2048,
        Llama 2 4096. The first chat models of Llama 2 have Llama 1's ε and get 2048.
        """
        if self.scaled:
            return 131072
        return {5e5: 8192, 1e6: 16384}.get(self.rope_theta, 2048 if self.norm_eps == 1e-6 else 4096)

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary frequencies; the scaling is Llama 3.1's, and Llama 3.2's for its small models (model cards)."""
        if not self.scaled:
            return {"rope_type": "default", "rope_theta": self.rope_theta}
        return {
            "rope_type": "llama3", "rope_theta": self.rope_theta, "factor": 32.0 if self.dim < 4096 else 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip


@dataclass(frozen=True)
class Joined:
    """One tensor: its name in every part, its whole shape, the dimension that the parts divide (None: each has all of
    it), and the number of heads whose rotary pairs change places.
    """

    name: str
    shape: tuple[int, ...]
    along: int | None = None
    heads: int | None = None

    def part_of(self, parts: int) -> tuple[int, ...]:
        """The shape that each of so many parts has."""
        return tuple(size // parts if at == self.along else size for at, size in enumerate(self.shape))

    def join(self, parts: list[Tensor]) -> Tensor:
        whole = parts[0] if self.along is None or len(parts) == 1 else torch.cat(parts, self.along)
        return whole if self.heads is None else _halves(whole, self.heads)


def _halves(weight_RC: Tensor, heads: int) -> Tensor:
    """Within each head, rows 0, 1, 2, … in the order 0, 2, 4, …, 1, 3, 5, …: Meta rotates neighbours, transformers the
    first half with the second.
    """
    rows, columns = weight_RC.shape
    return weight_RC.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


@final
@dataclass(frozen=True)
class MetaCheckpoint(Checkpoint):
    """Tensors under Hugging Face names, joined and permuted as they are read. side: holds `directory` in life."""

    params: Params
    parts: tuple[Path, ...]
    joined: Mapping[str, Joined]
    side: TemporaryDirectory[str]

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        wanted = {key: self.joined[key] for key in keys}
        pieces = [PICKLED.read(part, [joined.name for joined in wanted.values()]) for part in self.parts]
        return {key: joined.join([piece[joined.name] for piece in pieces]) for key, joined in wanted.items()}

    def paths(self) -> list[Path]:
        return [self.params.path, *self.parts]


@final
class MetaLayout(Layout):
    """A directory as Meta makes it."""

    patterns = ("consolidated.*.pth",)

    def found(self, directory: Path) -> bool:
        parts = any(directory.glob(*self.patterns))  # others leave a params.json beside their config
        return (directory / PARAMS).is_file() and (parts or not (directory / CONFIG).is_file())

    def open(self, directory: Path) -> MetaCheckpoint:
        """Reads params.json and the headers of all parts. Raises InputError when they do not make a whole Llama."""
        refuse_links(directory, (PARAMS, *self.patterns, TOKENIZER, *LICENCES))
        params = Params.read(directory / PARAMS)
        parts = _parts(directory, *self.patterns)
        headers = [PICKLED.headers(part) for part in parts]
        joined = _table(params, headers[0], len(parts))
        for part, found in zip(parts, headers, strict=True):
            _check(part, found, headers[0], joined, len(parts))
        side = TemporaryDirectory(prefix=f"obsprune-{directory.name}-")
        whole = {key: Header(parts[0].name, headers[0][one.name].dtype, one.shape) for key, one in joined.items()}
        checkpoint = MetaCheckpoint(Path(side.name), whole, params, parts, joined, side)
        _write_side_files(directory, checkpoint)
        return checkpoint


META = MetaLayout()


def _parts(directory: Path, pattern: str) -> tuple[Path, ...]:
    """consolidated.00.pth, consolidated.01.pth, …, none missing in between."""
    parts = tuple(sorted(directory.glob(pattern)))
    for index in range(max(1, len(parts))):
        name = f"consolidated.{index:02}.pth"
        if index >= len(parts) or parts[index].name != name:
            raise InputError(f"{directory} lacks {name}; download the checkpoint again")
    return parts


def _table(params: Params, part: Mapping[str, Header], parts: int) -> dict[str, Joined]:
    """{Hugging Face's name: how it is put together}. Sizes that params.json does not say are the first part's."""
    dim, kv_rows = params.dim, params.kv_rows
    rows, columns = _shape(params, part, "tok_embeddings.weight")
    along = ROWS if columns == dim else COLUMNS  # Llama 3 divides the vocabulary, the others the width
    vocabulary = rows * parts if along == ROWS else rows
    if params.vocabulary not in (-1, vocabulary):
        raise InputError(f"{params.path} says vocab_size {params.vocabulary}, and the embedding has {vocabulary} rows")
    hidden = _shape(params, part, "layers.0.feed_forward.w1.weight")[0] * parts
    table = {
        "model.embed_tokens": Joined("tok_embeddings.weight", (vocabulary, dim), along),
        "model.norm": Joined("norm.weight", (dim,)),
    }
    if "output.weight" in part:
        table["lm_head"] = Joined("output.weight", (vocabulary, dim), ROWS)
    for index in range(params.n_layers):
        ours, own = f"model.layers.{index}", f"layers.{index}"
        attention, mlp = f"{own}.attention", f"{own}.feed_forward"
        table |= {
            f"{ours}.self_attn.q_proj": Joined(f"{attention}.wq.weight", (dim, dim), ROWS, params.n_heads),
            f"{ours}.self_attn.k_proj": Joined(f"{attention}.wk.weight", (kv_rows, dim), ROWS, params.kv_heads),
            f"{ours}.self_attn.v_proj": Joined(f"{attention}.wv.weight", (kv_rows, dim), ROWS),
            f"{ours}.self_attn.o_proj": Joined(f"{attention}.wo.weight", (dim, dim), COLUMNS),
            f"{ours}.mlp.gate_proj": Joined(f"{mlp}.w1.weight", (hidden, dim), ROWS),
            f"{ours}.mlp.up_proj": Joined(f"{mlp}.w3.weight", (hidden, dim), ROWS),
            f"{ours}.mlp.down_proj": Joined(f"{mlp}.w2.weight", (dim, hidden), COLUMNS),
            f"{ours}.input_layernorm": Joined(f"{own}.attention_norm.weight", (dim,)),
            f"{ours}.post_attention_layernorm": Joined(f"{own}.ffn_norm.weight", (dim,)),
        }
    return {f"{key}.weight": joined for key, joined in table.items()}


def _shape(params: Params, part: Mapping[str, Header], name: str) -> tuple[int, int]:
    if name not in part or len(part[name].shape) != 2:
        raise InputError(f"{params.path.parent} has no matrix {name}; it is no Llama, or was not downloaded whole")
    rows, columns = part[name].shape
    return rows, columns


def _check(
    path: Path, found: Mapping[str, Header], first: Mapping[str, Header], table: Mapping[str, Joined], parts: int
) -> None:
    """Raises InputError when one of the parts is not the share of the model that it should be."""
    asked = {joined.name: joined.part_of(parts) for joined in table.values()}
    for name, shape in asked.items():
        if name not in found:
            raise InputError(f"{path} lacks {name}; download it again")
        if (found[name].shape, found[name].dtype) != (shape, first[name].dtype):
            raise InputError(
                f"{path}: {name} is {found[name].shape} in {found[name].dtype} and should be {shape} in "
                f"{first[name].dtype} by {PARAMS} and the first of {parts} parts; a part is missing, or another model's"
            )
    strange = sorted(found.keys() - asked.keys() - {"rope.freqs"})  # computed, not learned
    if strange:
        raise InputError(f"{path} holds {strange[0]}, which no Llama has; use the Hugging Face version of the model")


def _write_side_files(source: Path, checkpoint: MetaCheckpoint) -> None:
    """Config, tokenizer and licence as a Hugging Face checkpoint has them."""
    embedding, hidden = (
        checkpoint.headers[f"model.{name}.weight"] for name in ("embed_tokens", "layers.0.mlp.gate_proj")
    )
    params, directory = checkpoint.params, checkpoint.directory
    special: dict[str, Any] = {}
    for place in (source, source.parent):  # Meta's download.sh puts one tokenizer beside the folders of all sizes
        if not special and (place / TOKENIZER).is_file():
            special = convert_tokenizer(place / TOKENIZER, directory, params.scaled, params.positions)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=embedding.dtype,
        vocab_size=embedding.shape[0],
        hidden_size=params.dim,
        intermediate_size=hidden.shape[0],
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.kv_heads,
        rms_norm_eps=params.norm_eps,
        rope_parameters=params.rope,
        max_position_embeddings=params.positions,
        tie_word_embeddings="lm_head.weight" not in checkpoint.headers,
        **special,
    )
    config.save_pretrained(directory)
    for path in [path for pattern in LICENCES for path in source.glob(pattern)]:
        shutil.copyfile(path, directory / path.name)
