"""The kinds of models: what goes in, what comes out, and how far two outputs are apart. One value for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from obsprune.core.losses import cross_entropy, next_token_nll, perplexity
from obsprune.errors import InputError, first_line
from obsprune.models.corpora import NAMED, Reading, open_corpus
from obsprune.models.images import Labels, load_processor, open_images
from obsprune.models.samples import Batch, Source

IMAGES = "imagenet="


@dataclass(frozen=True)
class Wish:
    """What is asked of a source: its name, tokens in a sequence, the column of a table that holds the text."""

    name: str
    seqlen: int
    text_column: str | None = None
    split: str = "train"


class Kind(ABC):
    """name: what such a model is called; reads: text or images; auto: the transformers class that makes one; dataset:
    calibration where none is named; nsamples, heldout: how much of it where no number is given; correction: how far
    targets are moved at most (docs/methods.md, "Corrected targets"); tasks: evaluated where none is named; positional:
    whether there is a prediction for every token: too many logits to keep.
    """

    name: str
    reads: str
    auto: Any
    dataset: str | None
    tasks: tuple[str, ...]
    nsamples: int
    heldout: int
    correction: float
    positional: bool

    @abstractmethod
    def fits(self, architecture: str) -> bool:
        """Whether a class of this name has this kind's head."""

    @abstractmethod
    def trunk(self, network: Any) -> nn.Module:
        """The part of a network that the blocks are in. Raises InputError when it cannot be pruned."""

    @abstractmethod
    def classes(self, config: Any) -> int:
        """Width of the logits."""

    @abstractmethod
    def processor(self, directory: Path, trust_remote_code: bool) -> Any:
        """The tokenizer, or image processor. Raises InputError when the directory has none that can be used."""

    @abstractmethod
    def open(self, wish: Wish, config: Any, processor: Callable[[], Any]) -> tuple[Source, list[str]]:
        """A source of samples, and what the user should know about it. Raises InputError."""

    @abstractmethod
    def predictions(self, batch: Batch) -> int:
        """Predictions a divergence of this batch is a sum over."""

    @abstractmethod
    def loss(self, s: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """What the model itself is asked, summed, and over how many. s, t: log-probabilities of student and teacher."""

    @abstractmethod
    def told(self, nll: float, agreement: float) -> dict[str, float]:
        """What a person is told of a mean loss and of the share of the dense model's first choices."""

    @abstractmethod
    def small(self, batch: Batch) -> Batch:
        """A batch that is cheap to try things on."""


@final
@dataclass(frozen=True)
class CausalLM(Kind):
    """Text in, a distribution over the vocabulary for each next token out. words: one of them is in the name of such a
    class; part: gives the trunk of a network; notice: what the user should know.
    """

    name: str = "causal language model"
    auto: Any = AutoModelForCausalLM
    words: tuple[str, ...] = ("LM", "ConditionalGeneration")
    part: Callable[[Any], nn.Module] = lambda network: network
    notice: str | None = None
    reads = "text"
    dataset = "c4"
    nsamples, heldout, correction = 128, 16, 0.75
    tasks = ("heldout", "wikitext2")
    positional = True

    def fits(self, architecture: str) -> bool:
        return any(word in architecture for word in self.words)

    def trunk(self, network: Any) -> nn.Module:
        return self.part(network)

    def classes(self, config: Any) -> int:
        return int(config.get_text_config().vocab_size)

    def processor(self, directory: Path, trust_remote_code: bool) -> Any:
        try:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        except Exception as error:  # every tokenizer class fails in its own way
            raise InputError(
                f"{directory} has no usable tokenizer ({first_line(error)}); "
                "add one, or give token ids: --dataset FILE.safetensors"
            ) from error

    def open(self, wish: Wish, config: Any, processor: Callable[[], Any]) -> tuple[Source, list[str]]:
        if wish.name.startswith(IMAGES):
            raise InputError(
                f"{wish.name} are images and a {config.model_type} model reads text; give text or token ids"
            )
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        seqlen = min(wish.seqlen, int(most or wish.seqlen))
        cut = f"seqlen {wish.seqlen} is more than the model's {most}; {most} is used" if seqlen < wish.seqlen else None
        corpus = open_corpus(wish.name, Reading(processor, self.classes(config), seqlen, wish.text_column), wish.split)
        return corpus, [notice for notice in (self.notice, cut) if notice]

    def predictions(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def loss(self, s: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, int]:
        ids = batch["input_ids"]
        return next_token_nll(s, ids), ids.numel() - len(ids)

    def told(self, nll: float, agreement: float) -> dict[str, float]:
        return {"perplexity": perplexity(nll), "agreement": agreement}

    def small(self, batch: Batch) -> Batch:
        return {"input_ids": batch["input_ids"][:1, :64]}


@final
class ImageClassifier(Kind):
    """Images in, a distribution over classes out. What it is asked for is the dense model's answer: calibration images
    need no label.
    """

    name, reads = "image classifier", "images"
    auto = AutoModelForImageClassification
    dataset = None
    nsamples, heldout, correction = 512, 64, 0.35
    tasks = ("heldout",)
    positional = False

    def fits(self, architecture: str) -> bool:
        return "ForImageClassification" in architecture

    def trunk(self, network: Any) -> nn.Module:
        assert isinstance(network, nn.Module)
        return network

    def classes(self, config: Any) -> int:
        return int(config.num_labels)

    def processor(self, directory: Path, trust_remote_code: bool) -> Any:
        return load_processor(directory, trust_remote_code)

    def open(self, wish: Wish, config: Any, processor: Callable[[], Any]) -> tuple[Source, list[str]]:
        if wish.name in NAMED:
            raise InputError(
                f"{wish.name} is text and a {config.model_type} model reads images; give --dataset imagenet=PATH"
            )
        path = wish.name.removeprefix(IMAGES)
        return open_images(path, processor(), Labels(config), wish.split), []

    def predictions(self, batch: Batch) -> int:
        return len(batch["pixel_values"])

    def loss(self, s: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, int]:
        return cross_entropy(s, t), self.predictions(batch)

    def told(self, nll: float, agreement: float) -> dict[str, float]:
        return {"agreement": agreement}

    def small(self, batch: Batch) -> Batch:
        return {"pixel_values": batch["pixel_values"][:1]}


def _language_part(network: Any) -> nn.Module:
    config = network.config
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise InputError(
            f"the language part of a {config.model_type} model is an encoder and a decoder; only causal language "
            "models can be pruned yet"
        )
    part: nn.Module = network.get_decoder()
    return part


VISION_LANGUAGE = CausalLM(
    "vision-language model",
    AutoModelForImageTextToText,
    ("ConditionalGeneration", "VisionText2Text"),
    _language_part,
    "only the language part is pruned, calibrated and evaluated with text alone; everything else is copied as it is",
)
KINDS: tuple[Kind, ...] = (VISION_LANGUAGE, CausalLM(), ImageClassifier())
"""Where several fit, the first counts."""


def kind_of(config: Any) -> Kind:
    """The kind of model a config is for. Raises InputError for any other."""
    auto_map = getattr(config, "auto_map", None) or {}
    fitting = [k for k in KINDS if k.auto.__name__ in auto_map or type(config) in k.auto._model_mapping]
    if not fitting:
        raise InputError(
            f"a {config.model_type} model is neither a causal language model nor an image classifier, nor reads images "
            "and text; only those can be pruned yet"
        )
    architectures = config.architectures or []
    kind = next((k for k in fitting if any(map(k.fits, architectures))), None if architectures else fitting[0])
    if kind is None:
        raise InputError(
            f"the checkpoint holds a {architectures[0]}, which is no {fitting[0].name}: it has no head of that kind"
        )
    return kind


def head_of(network: Any) -> nn.Module | None:
    """The module that gives the logits: the output embeddings of a language model."""
    head = network.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None
