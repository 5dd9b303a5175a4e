"""From a directory or a Hugging Face id to a skeleton on the meta device, its blocks, and its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn
from transformers import AutoConfig

from obsprune.errors import InputError, first_line
from obsprune.models.blocks import Block, assign, find_blocks, require
from obsprune.models.checkpoint import CONFIG, SIDE_FILES, Checkpoint
from obsprune.models.kinds import Kind, Wish, head_of, kind_of
from obsprune.models.matrices import Matrix, find_matrices, fused_experts
from obsprune.models.names import module_names
from obsprune.models.samples import Batch, Samples, Source

DEMO = "demo"
RUNNING = ("running_mean", "running_var")
"""Statistics of norms, without which a model is not whole."""
META_LAYOUT = re.compile(r"meta-llama/Llama-2-\d+b(-chat)?")
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """A model ready to be walked: everything but the blocks in memory, the blocks on meta until they are loaded.

    skipped: {weight's name: why it is not pruned}.
    """

    kind: Kind
    network: nn.Module
    config: Any
    directory: Path
    checkpoint: Checkpoint
    blocks: list[Block]
    rest: list[str]
    skipped: dict[str, str]
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool

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
        return self.kind.processor(self.directory, self.trust_remote_code)

    def open(self, wish: Wish) -> tuple[Source, list[str]]:
        """A source of samples for this model, and what the user should know about it. Raises InputError."""
        return self.kind.open(wish, self.config, lambda: self.processor)

    def batches(self, samples: Samples, size: int) -> list[Batch]:
        """Keyword arguments of the network, `size` samples each, on its device and in its dtype."""
        return [
            {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in batch.items()}
            for batch in samples.batches(size, self.device)
        ]

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
    except ValueError as error:
        raise InputError(f"a {model.config.model_type} model refuses its input: {first_line(error)}") from error


def locate(name: str, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a checkpoint: `demo`, a local directory, or a Hugging Face id (downloaded into its cache).

    Raises InputError with the way out for everything else.
    """
    if name == DEMO:
        return Path(str(files("obsprune"))) / "demo"
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.exists():
        raise InputError(f"{name} is a file; give the checkpoint's directory")
    if META_LAYOUT.fullmatch(name):
        raise InputError(f"{name} holds Meta's original files, which are not read yet; use {name}-hf")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(f"there is no directory {name}")
    return _checked(_download(name, revision, token))


def _download(name: str, revision: str | None, token: str | None) -> Path:
    wanted, twice = [*SIDE_FILES, "*.safetensors"], ["consolidated*", "original/*"]  # the same weights, Meta's way
    try:
        return Path(
            snapshot_download(name, revision=revision, token=token, allow_patterns=wanted, ignore_patterns=twice)
        )
    except GatedRepoError as error:
        raise InputError(f"{name} is gated: accept its licence on the hub and give --token or set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no directory and no Hugging Face model '{name}' (a private one needs --token)"
        ) from error
    except HFValidationError as error:
        raise InputError(f"'{name}' is neither a directory nor a Hugging Face id") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"'{name}' is no local directory, is not in the Hugging Face cache, and the hub cannot be reached "
            "(no network, or HF_HUB_OFFLINE is set)"
        ) from error


def _checked(directory: Path) -> Path:
    if (directory / CONFIG).is_file():
        return directory
    if (directory / "params.json").is_file():
        raise InputError(
            f"{directory} holds Meta's original files, which are not read yet; use the repository named -hf"
        )
    raise InputError(f"{directory} is not a checkpoint: it has no {CONFIG}")


def read_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """The config of a model. Raises InputError when it is damaged or quantised."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # remote code, unknown architectures and broken JSON all end here
        raise InputError(f"{directory / CONFIG} cannot be used: {first_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise InputError(f"{directory} is quantised; prune the unquantised checkpoint it was made from")
    return config


def load(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    blocks: str | None = None,
    skip: list[str] | None = None,
    depthwise: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Opens a checkpoint: config → skeleton on meta → everything outside the blocks.

    dtype: of the forward passes (`auto`: as stored; float16 is computed in float32 on a CPU); skip: regular expressions
    of matrices' names that stay dense; depthwise: prune depthwise convolutions, too. Raises InputError.
    """
    directory = locate(name, revision, token)
    config = read_config(directory, trust_remote_code)
    kind = kind_of(config)
    checkpoint = Checkpoint.open(directory)
    place = choose_device(device)
    compute = choose_dtype(dtype, checkpoint, place)
    network = _skeleton(kind, config, compute, trust_remote_code)
    names = module_names(network, checkpoint.headers)
    made = [_block(prefix, module, checkpoint, names) for prefix, module in find_blocks(network, config, blocks)]
    inside = {key for block in made for key in block.keys}
    rest = [key for key in checkpoint.headers if key not in inside]
    _load_rest(network, checkpoint, {key: names[key] for key in rest}, place)
    prefixes = tuple(f"{block.name}." for block in made)
    outside = {name for name, p in network.named_parameters() if p.is_meta and not name.startswith(prefixes)}
    require(directory, "", outside)
    skipped = _choose_matrices(network, made, checkpoint, names, skip or [], depthwise)
    return Model(kind, network, config, directory, checkpoint, made, rest, skipped, place, compute, trust_remote_code)


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
        except (TypeError, ImportError) as error:  # several classes for one config and none named; a package is missing
            raise InputError(
                f"transformers cannot make a {config.model_type} model of this config ({first_line(error)}); "
                "name its class as `architectures` there, or install what it asks for"
            ) from error
    return network.eval().requires_grad_(False)


def _block(prefix: str, module: nn.Module, checkpoint: Checkpoint, names: dict[str, str]) -> Block:
    own = module.state_dict()
    keys = {
        key: inner if (inner := name.removeprefix(f"{prefix}.")) in own else None
        for key, name in names.items()
        if name.startswith(f"{prefix}.")
    }
    experts = fused_experts(module)
    if experts:
        raise InputError(f"{prefix}.{experts[0]} holds the experts of a mixture; such models are not supported yet")
    needed = {name for name, _ in module.named_parameters()} | {name for name in own if name.endswith(RUNNING)}
    require(checkpoint.directory, prefix, needed - set(keys.values()))
    return Block(prefix, module, checkpoint, keys)


def _load_rest(network: Any, checkpoint: Checkpoint, names: dict[str, str], device: torch.device) -> None:
    """Loads everything outside the blocks, which stay on meta. Tensors the network has no place for are ignored."""
    known = network.state_dict()
    wanted = {key: name for key, name in names.items() if name in known}
    tensors = {wanted[key]: tensor for key, tensor in checkpoint.read(wanted).items()}
    assign(network, tensors, device, network.config.model_type)
    # as from_pretrained calls it: a head that is stored apart and differs from the embedding is not tied
    network.tie_weights(missing_keys=known.keys() - set(wanted.values()), recompute_mapping=False)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _choose_matrices(
    network: nn.Module,
    blocks: list[Block],
    checkpoint: Checkpoint,
    names: dict[str, str],
    skip: list[str],
    depthwise: bool,
) -> dict[str, str]:
    """Gives each block its matrices; returns {weight: why it stays dense} for every other weight of two dimensions."""
    stored = {name: checkpoint.headers[key].dtype for key, name in names.items()}
    skipped: dict[str, str] = {}
    for block in blocks:
        for matrix in find_matrices(block.name, block.module, lambda name: stored[name]):
            why = _why_skipped(matrix, skip, depthwise)
            if why:
                skipped[matrix.layer] = why
            else:
                block.matrices.append(matrix)
    pruned = {matrix.parameter for block in blocks for matrix in block.matrices}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1 and name not in pruned and name.removesuffix(".weight") not in skipped:
            skipped[name.removesuffix(".weight")] = _why_dense(network, name, {block.name for block in blocks})
    return skipped


def _why_skipped(matrix: Matrix, skip: list[str], depthwise: bool) -> str | None:
    pattern = next((pattern for pattern in skip if re.search(pattern, matrix.name)), None)
    if pattern:
        return f"matches --skip {pattern}"
    own = matrix.depthwise and not depthwise
    return "depthwise convolution; --set model.depthwise=true prunes them, too" if own else None


def _why_dense(network: Any, name: str, blocks: set[str]) -> str:
    if any(name.startswith(f"{block}.") for block in blocks):
        return "not a linear layer"
    owner = network.get_submodule(name.rpartition(".")[0])
    if owner is head_of(network):
        return "output head"
    return "embedding" if owner is _embedding_of(network) else "outside the blocks"


def _embedding_of(network: Any) -> nn.Module | None:
    try:
        embedding: nn.Module = network.get_input_embeddings()
    except NotImplementedError:  # convolutional networks have none
        return None
    return embedding
