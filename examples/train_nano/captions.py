"""The words of the nano model: its tokenizer, and captions as numbers."""

import json
from pathlib import Path

import numpy as np
import torch
from sprite_package import SPRITES
from sprite_scenes import PATTERNS, SCENERY
from synthetic import BACKGROUND_TEXTURES, COLOURS, OBJECT_TEXTURES, SHAPES
from torch import Tensor

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
PAD, END, _, UNKNOWN = range(4)
BLANK = "\u2581"  # stands before each word
WORDS = ("a", "an", "the", "and", "on", "with", "background", *SHAPES, *COLOURS)
WORDS += (*OBJECT_TEXTURES, *BACKGROUND_TEXTURES[1:])
# New words come last, so that the numbers of the others stay those of an earlier checkpoint.
WORDS += tuple(word for word in (*SPRITES, *SCENERY, *PATTERNS, "gradient") if word not in WORDS)
TEXT_LEN = 32  # rows that the DiT reads
VOCAB = len(SPECIAL) + len(WORDS)


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and its settings: one number a word, whatever its case; punctuation is left out."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = [*SPECIAL, *(f"{BLANK}{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], unk_id=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\w\s]"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme="always")
    end = SPECIAL[END]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, END)])
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": SPECIAL[PAD], "eos_token": end, "unk_token": SPECIAL[UNKNOWN]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", **names}, indent=2)
    )


def numbers_of(captions: list[str], rng: np.random.Generator, drop: float) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [B, L]. A caption is dropped (left empty) with probability `drop`; in a tenth of
    the others one word that the model does not know stands somewhere, as people will write some.
    """
    number = {word: len(SPECIAL) + i for i, word in enumerate(WORDS)}
    rows = []
    for caption in captions:
        row = [] if rng.random() < drop else [number[word] for word in caption.split()]
        if row and rng.random() < 0.1:
            row.insert(int(rng.integers(len(row) + 1)), UNKNOWN)
        rows.append([*row, END])
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    return ids, (ids != PAD).long()
