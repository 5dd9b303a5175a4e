"""Train a Llama of a few million parameters on local texts: a second, larger real model to measure pruning on.

    OMP_NUM_THREADS=1 python scripts/make_reference_model.py OUT --stories FILE --more FILE [FILE]

`--stories` is split: most of it is trained on, the rest is written to OUT/calibration.txt and never seen. Files are
.txt (documents separated by lines `<|endoftext|>`) or .jsonl, as for --dataset. Do not give it what you will evaluate
on. Takes about 3e6 x 18 flop a token: 40 minutes of one CPU core, or seconds of a GPU.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from make_demo_model import LENGTH, SEPARATOR, batches, make_model, save_tokenizer, train, train_tokenizer

from obsprune.models.corpora import read_documents

VOCABULARY = 2048
SIZE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "initializer_range": 0.03,
}
TRAINED = 0.7
"""The share of the stories that is trained on."""


def documents(path: Path) -> list[str]:
    """The texts of one file."""
    return [text for text in read_documents(path) if text.strip()]


def endless(texts: list[str]) -> Iterator[str]:
    """The texts in a new order each time."""
    shuffle = random.Random(0)
    while True:
        yield from shuffle.sample(texts, len(texts))


def main() -> None:
    """Split the stories, then make the tokenizer, then the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--more", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {LENGTH} tokens per step")
    parser.add_argument("--rate", type=float, default=2e-3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stories = documents(given.stories)
    edge = round(TRAINED * len(stories))
    (given.out / "calibration.txt").write_text(SEPARATOR.join(stories[edge:]) + "\n")
    texts = [*stories[:edge], *(text for path in given.more for text in documents(path))]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    save_tokenizer(tokenizer, given.out)
    model = make_model(tokenizer, **SIZE)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    train(model, batches(tokenizer, endless(texts), given.rows), given.steps, given.rate)
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
