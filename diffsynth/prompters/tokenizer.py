"""The UMT5 tokenizer of a checkpoint: text to token ids, with the end token last.

`tokenizer.json` is read by the `tokenizers` package, or else `spiece.model` by `sentencepiece`; both give the
same ids. Neither goes through transformers, whose T5 classes change the id of unknown characters.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import SEEK_CUR, BytesIO
from pathlib import Path

END_ID = 1
END_PIECE = "</s>"
JSON_FILE, PIECE_FILE = "tokenizer.json", "spiece.model"
_DOWNLOAD = "fastvmt download 1.3b"
# Where checkpoints keep the tokenizer, relative to the folder of the text encoder's weights.
_FOLDERS = ("google/umt5-xxl", "tokenizer", "../tokenizer", ".")
# Numbers of the protobuf fields of a whole sentencepiece model: pieces, trainer, normaliser (at the end).
_MODEL_FIELDS = {1, 2, 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class WanTokenizer:
    """Turns text into ids; see `load_tokenizer`."""

    pieces: Callable[[str], list[int]]  # maps a text to its ids without the end token
    vocab_size: int  # number of ids
    file: Path  # from which it was loaded

    def encode(self, text: str, max_length: int | None = 512) -> list[int]:
        """Return the ids of a text and the end token, truncated to max_length ids unless that is None.

        Special tokens written in the text ("</s>", "<pad>") are ordinary text.
        """
        ids = [*self.pieces(text), END_ID]
        return ids if max_length is None else cut(ids, max_length)

    def __call__(self, texts: Sequence[str], max_length: int | None = 512) -> list[list[int]]:
        """Return `encode` of each text, without padding, so the lists differ in length."""
        return [self.encode(text, max_length) for text in texts]


def cut(ids: list[int], max_length: int) -> list[int]:
    """Truncate ids to max_length, keeping the end token; ValueError if max_length is below 1."""
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, the end token; got {max_length}")
    return ids if len(ids) <= max_length else [*ids[: max_length - 1], END_ID]


def load_tokenizer(folder: str | Path) -> WanTokenizer:
    """Load the tokenizer in a folder from tokenizer.json or, failing that, spiece.model.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: a file is damaged or of another kind; the message names it.
    """
    if (file := Path(folder, JSON_FILE)).is_file():
        return _from_json(file)
    if (file := Path(folder, PIECE_FILE)).is_file():
        return tokenizer_from_pieces(file.read_bytes(), file)
    raise FileNotFoundError(
        f"tokenizer folder {folder} holds neither {JSON_FILE} nor {PIECE_FILE}; fetch them by: {_DOWNLOAD}"
    )


def find_tokenizer(weights_folder: str | Path) -> Path:
    """Return the folder of a checkpoint's tokenizer, which is in or near that of the text encoder.

    Raises:
        FileNotFoundError: there is none; the message names the folders that were searched.
    """
    folders = [Path(weights_folder) / folder for folder in _FOLDERS]
    for folder in folders:
        if any((folder / name).is_file() for name in (JSON_FILE, PIECE_FILE)):
            return folder
    raise FileNotFoundError(
        f"no {JSON_FILE} or {PIECE_FILE} in any of {', '.join(map(str, folders))}; fetch them by: {_DOWNLOAD}"
    )


def _from_json(file: Path) -> WanTokenizer:
    from tokenizers import Tokenizer

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _make_special_tokens_unmatchable(content)
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{file} is damaged or not a UMT5 tokenizer ({error!r}); fetch it again") from error
    return WanTokenizer(
        pieces=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        vocab_size=tokenizer.get_vocab_size(),
        file=file,
    )


def _make_special_tokens_unmatchable(content: dict) -> None:
    """Edit a tokenizer.json so that its special tokens never match in a text, as in sentencepiece."""
    vocab = content["model"]["vocab"]
    if vocab[END_ID][0] != END_PIECE:
        raise ValueError(f"id {END_ID} is {vocab[END_ID][0]!r}, not {END_PIECE!r}")
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    # They are in the vocabulary, too. A piece with a space never matches: spaces become U+2581 beforehand.
    content["model"]["vocab"] = [[f" {word}" if word in special else word, score] for word, score in vocab]
    content["post_processor"] = content["truncation"] = content["padding"] = None


def tokenizer_from_pieces(model: bytes, file: Path) -> WanTokenizer:
    """Return the tokenizer of a serialised sentencepiece model, which was read from `file`."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        # A file truncated between two pieces would load, but lack its last pieces and its settings.
        if not _top_level_fields(model) >= _MODEL_FIELDS:
            raise ValueError("the file is cut short")
        processor.LoadFromSerializedProto(model)
        if processor.eos_id() != END_ID:
            raise ValueError(f"id of {END_PIECE!r} is {processor.eos_id()}, not {END_ID}")
    except (RuntimeError, IndexError, OverflowError, ValueError) as error:
        raise ValueError(f"{file} is damaged or not a UMT5 tokenizer ({error!r}); fetch it again") from error
    return WanTokenizer(pieces=processor.encode, vocab_size=processor.vocab_size(), file=file)


def _top_level_fields(message: bytes) -> set[int]:
    """Return the numbers of a protobuf message's length-delimited fields; IndexError if it is truncated."""
    fields, stream = set(), BytesIO(message)
    while stream.tell() < len(message):
        fields.add(_varint(stream) >> 3)
        stream.seek(_varint(stream), SEEK_CUR)
    if stream.tell() > len(message):
        raise IndexError("the last field is cut short")
    return fields


def _varint(stream: BytesIO) -> int:
    """Return the next protobuf integer: seven bits a byte, lowest first."""
    byte = stream.read(1)[0]
    return byte if byte < 0x80 else byte & 0x7F | _varint(stream) << 7
