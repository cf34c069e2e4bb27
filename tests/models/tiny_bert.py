"""A BERT of a few hundred parameters with random weights and a tokenizer of whole words, as transformers saves it."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = {
    "bad": ["loss", "default", "late", "falls"],
    "good": ["profit", "paid", "early", "rises"],
    "dull": ["report", "meeting", "office", "notes"],
}
COMMON = ["the", "firm", "bank", "loan", "of", "today", "says", "it", "and", "quarter"]
MAX_POSITIONS = 32


def write_tiny_bert(folder: Path, seed: int = 0) -> Path:
    """Write config, safetensors and tokenizer into a folder."""
    from dist_train.models.text_base import import_transformers

    transformers = import_transformers()
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COMMON, *(w for ws in WORDS.values() for w in ws)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=MAX_POSITIONS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


def write_texts(file: Path, rows: int = 120, seed: int = 0) -> Path:
    """Texts of 2 to 20 words, of which one tells the class."""
    draw = random.Random(seed)
    lines = ["text,label"]
    for number in range(rows):
        label = list(WORDS)[number % 3]
        words = [draw.choice(COMMON) for _ in range(draw.randint(1, 19))]
        words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS[label]))
        lines.append(f"{' '.join(words)},{label}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file
