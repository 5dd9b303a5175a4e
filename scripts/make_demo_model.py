"""Make the demo model: a tiny Llama trained on the stories of `demo_grammar`.

Writes the tokenizer, the model and two texts (`calibration.txt`, `evaluation.txt`)
into the package, so that every command can be tried without a download. It is
seeded: run with OMP_NUM_THREADS=1, it writes the same bytes again on one machine.

    OMP_NUM_THREADS=1 python scripts/make_demo_model.py
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from demo_grammar import stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parents[1] / "src" / "obsprune" / "demo"
SEPARATOR = "\n<|endoftext|>\n"
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
VOCABULARY = 768
LENGTH = 256
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention
    "initializer_range": 0.05,
}
TRAINING_SEED, CALIBRATION_SEED, EVALUATION_SEED = 1, 2, 3


def take(source: Iterable[str], size: int, seen: set[str]) -> list[str]:
    """Take about `size` characters of stories that nobody has seen, and remember them."""
    taken: list[str] = []
    for story in source:
        if story not in seen:
            seen.add(story)
            taken.append(story)
            size -= len(story) + len(SEPARATOR)
        if size <= 0:
            break
    return taken


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer that puts BOS in front of every text."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[BOS, EOS, UNK], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=LENGTH,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, **size: Any) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings; size: the rest of its config."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **size,
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], rows: int) -> Iterator[torch.Tensor]:
    """Cut the endless stream of tokenized stories into batches of full rows."""
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text).input_ids
        if len(tokens) >= rows * LENGTH:
            yield torch.tensor(tokens[: rows * LENGTH]).view(rows, LENGTH)
            tokens = tokens[rows * LENGTH :]


def learning_rate(step: int, steps: int) -> float:
    """The share of the peak rate: a short warm-up, then a cosine down to zero."""
    warm_up = min(1.0, (step + 1) / 100)
    return warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(model: LlamaForCausalLM, data: Iterable[torch.Tensor], steps: int, peak: float) -> None:
    """Train with AdamW on `steps` batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    for step, batch in enumerate(itertools.islice(data, steps)):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under the class name that old and new transformers both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line; its defaults make the committed model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--rows", type=int, default=8, help=f"rows of {LENGTH} tokens per step")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    return parser.parse_args()


def main() -> None:
    """Make the texts, then the tokenizer, then the model."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    seen: set[str] = set()
    for name, seed, size in [
        ("evaluation", EVALUATION_SEED, 60_000),
        ("calibration", CALIBRATION_SEED, 300_000),
    ]:
        texts = take(stories(seed), size, seen)
        (args.out / f"{name}.txt").write_text(SEPARATOR.join(texts) + "\n")
    tokenizer = train_tokenizer(itertools.islice(stories(TRAINING_SEED), 4000))
    save_tokenizer(tokenizer, args.out)
    model = make_model(tokenizer, **SIZE)
    fresh = (story for story in stories(TRAINING_SEED) if story not in seen)
    train(model, batches(tokenizer, fresh, args.rows), args.steps, args.rate)
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
