"""A small tokenizer in the layout of google/umt5-xxl, trained on the sentences beside this file."""

import io
import json
from pathlib import Path
from typing import Any

_SENTENCES = Path(__file__).with_name("tokenizer_sentences.txt").read_text().splitlines()

# As umt5's: these ids, and no normalisation beside white space.
_SPECIAL = {"pad": ("<pad>", 0), "eos": ("</s>", 1), "bos": ("<s>", 2), "unk": ("<unk>", 3)}
_MARK = "\u2581"  # stands for a blank


def write_tokenizer(folder: str | Path, vocab_size: int = 160) -> int:
    """Write spiece.model, the tokenizer.json made from it and their two settings files; the same every time.

    Returns:
        The number of ids, fewer than vocab_size if the sentences do not yield as many.

    Raises:
        ValueError: vocab_size is too small for the characters of the sentences.
    """
    from sentencepiece import SentencePieceProcessor

    characters = set("".join(_SENTENCES).replace(" ", _MARK))
    smallest = len(characters) + len(_SPECIAL)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}; got {vocab_size}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = _train(vocab_size)
    (folder / "spiece.model").write_bytes(model)
    processor = SentencePieceProcessor(model_proto=model)
    vocab = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
    names = {f"{name}_token": piece for name, (piece, _) in _SPECIAL.items()}
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": [], **names}
    for file, content in (
        ("tokenizer.json", _fast_tokenizer(vocab)),
        ("tokenizer_config.json", json.dumps(settings, indent=2)),
        ("special_tokens_map.json", json.dumps(names, indent=2)),
    ):
        (folder / file).write_text(content, encoding="utf-8")
    return len(vocab)


def _train(vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    ids: dict[str, Any] = {f"{name}_id": number for name, (_, number) in _SPECIAL.items()}
    SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        **ids,
    )
    return model.getvalue()


def _fast_tokenizer(vocab: list[tuple[str, float]]) -> str:
    """Return a tokenizer.json that yields the ids of the sentencepiece model with this vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    end, end_id = _SPECIAL["eos"]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=_SPECIAL["unk"][1], byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_MARK, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=_MARK, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, end_id)]
    )
    tokenizer.add_special_tokens([piece for piece, _ in _SPECIAL.values()])
    return tokenizer.to_str(pretty=True)
