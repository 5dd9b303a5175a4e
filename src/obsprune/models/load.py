"""From a directory or a Hugging Face id to a skeleton on the meta device, its blocks, and its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from accelerate import init_empty_weights
from torch import nn

from obsprune.errors import InputError, first_line
from obsprune.models.activations import Choose, chooser, on_device, trim_heap
from obsprune.models.ahead import ReadAhead
from obsprune.models.blocks import Block, assign, find_blocks, require
from obsprune.models.caution import is_dir, is_file
from obsprune.models.checkpoint import CONFIG, Checkpoint
from obsprune.models.choice import choose_matrices
from obsprune.models.config import read_config
from obsprune.models.experts import watchable
from obsprune.models.files import FILE_KINDS
from obsprune.models.hub import download
from obsprune.models.kinds import Kind, Wish, head_of, kind_of
from obsprune.models.matrices import Matrix
from obsprune.models.meta import META
from obsprune.models.names import Names, names_of
from obsprune.models.packed_layout import PACKED
from obsprune.models.samples import Batch, Samples, Source
from obsprune.models.walk import Walk
from obsprune.ranks import ALONE, Ranks

DEMO = "demo"
UNFINISHED = "progress.jsonl"
"""A run's journal (engine/rundir.py), beside which a config is written last."""
RUNNING = ("running_mean", "running_var")
"""Statistics of norms, without which a model is not whole."""
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """A model ready to be walked: everything but the blocks in memory, the blocks on meta until they are loaded.

    names: how all its tensors are stored; skipped: {weight's name: why it is not pruned}; activations: where those of
    waiting batches live.
    """

    kind: Kind
    network: nn.Module
    config: Any
    directory: Path
    checkpoint: Checkpoint
    names: Names
    blocks: list[Block]
    rest: list[str]
    skipped: dict[str, str]
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool
    ranks: Ranks
    activations: Choose = on_device

    @property
    def matrices(self) -> list[Matrix]:
        return [matrix for block in self.blocks for matrix in block.matrices]

    @property
    def classes(self) -> int:
        """Width of the logits: the vocabulary, or the labels."""
        return self.kind.classes(self.config)

    @property
    def head(self) -> nn.Module:
        """The output head: final hidden states in, logits out. Raises InputError when the model has none of its own."""
        head = head_of(self.network)
        if head is None:
            raise InputError(f"a {self.config.model_type} model has no output head of its own; only --iters 1 works")
        return head

    @cached_property
    def processor(self) -> Any:
        """The tokenizer, or image processor. Raises InputError when the directory has none."""
        made = self.checkpoint.directory  # a temporary one, of which nobody knows, where the layout is Meta's or packed
        try:
            return self.kind.processor(made, self.trust_remote_code)
        except InputError as error:
            raise InputError(str(error).replace(str(made), str(self.directory))) from error

    def open(self, wish: Wish) -> tuple[Source, list[str]]:
        """A source of samples for this model, and what the user should know about it. Raises InputError."""
        return self.kind.open(wish, self.config, lambda: self.processor)

    def shared(self, samples: Samples, size: int) -> list[Batch]:
        """The part of this process of `batches`: as many as all others have, together of `size` samples each."""
        mine = samples.take(self.ranks.mine(len(samples)))
        return self.batches(mine, self.ranks.part(len(samples), size))

    def batches(self, samples: Samples, size: int) -> list[Batch]:
        """Keyword arguments of the network, `size` samples each, on its device and in its dtype."""
        return [
            {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in batch.items()}
            for batch in samples.batches(size, self.device)
        ]

    def walk(
        self,
        batches: Sequence[Mapping[str, torch.Tensor]],
        finish: Callable[[int, Any], None] = lambda key, output: None,
        record: bool = False,
    ) -> Walk:
        """Batches on their way through the network, which stop at every block (models/walk.py). What autograd follows
        (`record`) stays on the device.
        """
        choose = on_device if record else self.activations
        return Walk(self.network, [block.module for block in self.blocks], batches, finish, record, choose)

    def keeping(self, activations: str, folder: Path) -> Model:
        """The same model, whose waiting activations live elsewhere (models/activations.py: chooser)."""
        return replace(self, activations=chooser(activations, self.device, folder))

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """While open, all blocks are on the device: the network is an ordinary one."""
        with ExitStack() as held:
            for block in self.blocks:
                held.enter_context(block.loaded(self.device))
            yield

    @contextmanager
    def lazily_loaded(self) -> Iterator[None]:
        """While open, a plain forward of the network loads each block when it comes to it and drops it afterwards."""
        with ExitStack() as hooks:
            for block in self.blocks:
                open_block = ExitStack()
                enter = block.module.register_forward_pre_hook(
                    lambda *_, block=block, held=open_block: held.enter_context(block.loaded(self.device)) and None
                )
                leave = block.module.register_forward_hook(lambda *_, held=open_block: held.close())
                hooks.callback(enter.remove)
                hooks.callback(leave.remove)
                hooks.callback(open_block.close)
            yield


@contextmanager
def suitable(model: Model) -> Iterator[None]:
    """While open, a model that refuses its input (images of another size) raises InputError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError) as error:  # each layer says it in its own way
        raise InputError(f"a {model.config.model_type} model refuses its input: {first_line(error)}") from error


def locate(name: str, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a checkpoint: `demo`, a local directory, or a Hugging Face id (downloaded into its cache).

    Raises InputError with the way out for everything else.
    """
    if name == DEMO:
        return Path(str(files("obsprune"))) / "demo"
    path = Path(name).expanduser()
    if is_dir(path):
        return _checked(path)
    if is_file(path):
        raise InputError(f"{name} is a file; give the checkpoint's directory")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(f"there is no directory {name}")
    return _checked(download(name, revision, token))


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in a directory: packed, as Hugging Face writes it or, where there is none, as Meta does."""
    if PACKED.found(directory):
        return PACKED.open(directory)
    stored = any(kind.found(directory) for kind in FILE_KINDS)
    return META.open(directory) if META.found(directory) and not stored else Checkpoint.open(directory)


def _checked(directory: Path) -> Path:
    if (directory / CONFIG).is_file() or META.found(directory):
        return directory
    if is_file(directory / UNFINISHED):
        raise InputError(f"{directory} holds an unfinished run of obsprune; repeat its command to go on")
    raise InputError(f"{directory} is not a checkpoint: it has no {CONFIG}")


class Asked(TypedDict, total=False):
    """How a checkpoint is opened. dtype: of the forward passes (`auto`: as stored; float16 is computed in float32 on a
    CPU); blocks: a pattern of their names; skip: regular expressions of matrices' names that stay dense; depthwise:
    prune depthwise convolutions, too; ranks: the processes that share the work.
    """

    revision: str | None
    token: str | None
    dtype: str
    device: str
    blocks: str | None
    skip: list[str] | None
    depthwise: bool
    trust_remote_code: bool
    ranks: Ranks


def load(name: str, **asked: Unpack[Asked]) -> Model:
    """Opens a checkpoint: its outline, then the weights outside the blocks. Raises InputError."""
    trim_heap()  # before anything large is read
    model = outline(name, **asked)
    _load_rest(model)
    return model


def outline(name: str, **asked: Unpack[Asked]) -> Model:
    """A model without a weight: config → skeleton on meta → blocks and what is pruned in them, from the files' headers
    alone. Raises InputError.
    """
    directory = locate(name, asked.get("revision"), asked.get("token"))
    checkpoint = open_checkpoint(directory)
    trust_remote_code = asked.get("trust_remote_code", False)
    config = read_config(checkpoint.directory, trust_remote_code)
    kind = kind_of(config)
    ranks = asked.get("ranks", ALONE)
    place = choose_device(ranks.device(asked.get("device", "auto")))
    compute = choose_dtype(asked.get("dtype", "auto"), checkpoint, place)
    network = _skeleton(kind, config, compute, trust_remote_code)
    names = names_of(network, checkpoint.headers)
    found = find_blocks(network, config, asked.get("blocks"), kind.trunk(network))
    blocks = [_block(prefix, module, checkpoint, names) for prefix, module in found]
    inside = {key for block in blocks for key in block.keys}
    if place.type != "cpu":
        read_ahead(blocks, pin=True)
    rest = [key for key in checkpoint.headers if key not in inside]
    skip, depthwise = asked.get("skip") or [], asked.get("depthwise", False)
    skipped = choose_matrices(kind, network, blocks, checkpoint, names, skip, depthwise)
    return Model(
        kind,
        network,
        config,
        directory,
        checkpoint,
        names,
        blocks,
        rest,
        skipped,
        place,
        compute,
        trust_remote_code,
        ranks,
    )


def read_ahead(blocks: list[Block], pin: bool) -> None:
    """From now on the blocks of a model are read ahead, where they are loaded in order."""
    ahead = ReadAhead(blocks, pin)
    for block in blocks:
        block.ahead = ahead


def choose_device(device: str) -> torch.device:
    """The device meant by `auto`, `cpu`, `cuda`, `cuda:1`. Raises InputError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{device}' cannot be used here: {first_line(error)}") from error


def choose_dtype(dtype: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype of the forward passes."""
    if dtype != "auto":
        if dtype not in COMPUTE_DTYPES:
            raise InputError(f"unknown dtype '{dtype}'; known: auto, {', '.join(COMPUTE_DTYPES)}")
        return COMPUTE_DTYPES[dtype]
    bytes_of: dict[torch.dtype, int] = {}
    for header in checkpoint.headers.values():
        if header.dtype.is_floating_point:
            bytes_of[header.dtype] = bytes_of.get(header.dtype, 0) + header.bytes
    if not bytes_of:
        raise InputError(f"{checkpoint.directory} holds no floating-point weights")
    stored = max(bytes_of, key=lambda dtype: bytes_of[dtype])
    slow = stored == torch.float16 and device.type == "cpu"  # a float16 product on a CPU is 200 times slower
    return torch.float32 if slow or stored == torch.float64 else stored


def _skeleton(kind: Kind, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    config.use_cache = config.get_text_config().use_cache = False  # a cache would grow each time a block is run again
    with init_empty_weights(include_buffers=False):  # buffers no checkpoint holds (rotary frequencies) stay real
        try:
            network: Any = kind.auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except Exception as error:  # no class named, a package missing, impossible sizes: each fails in its own way
            raise InputError(
                f"transformers cannot make a {config.model_type} model of this config ({first_line(error)}); "
                "name its class as `architectures` there, install what it asks for, or download the config again"
            ) from error
    watchable(network)
    return network.eval().requires_grad_(False)


def _block(prefix: str, module: nn.Module, checkpoint: Checkpoint, names: Names) -> Block:
    own, block = module.state_dict(), Block(prefix, module, checkpoint, names.inside(prefix))
    needed = {name for name, _ in module.named_parameters()} | {name for name in own if name.endswith(RUNNING)}
    require(checkpoint.directory, "", {f"{prefix}.{name}" for name in needed} - block.names.sources.keys())
    return block


def _load_rest(model: Model) -> None:
    """Loads everything outside the blocks, which stay on meta. Tensors the network has no place for are ignored."""
    network: Any = model.network
    known = network.state_dict()
    wanted = model.names.stored_as(model.rest).making(known)
    tensors = {name: x for name, x in wanted.join(model.checkpoint.read(wanted.keys)).items() if name in known}
    assign(network, tensors, model.device, network.config.model_type)
    # as from_pretrained calls it: a head that is stored apart and differs from the embedding is not tied
    network.tie_weights(missing_keys=known.keys() - tensors.keys(), recompute_mapping=False)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(model.device)
    prefixes = tuple(f"{block.name}." for block in model.blocks)
    outside = {name for name, p in network.named_parameters() if p.is_meta and not name.startswith(prefixes)}
    require(model.directory, "", outside)
