"""How values are written on a command line: whole numbers, lists with commas, "none"."""

import argparse
from collections.abc import Callable
from pathlib import Path

Reader = Callable[[str], object]


def whole(text: str) -> int:
    """A whole number."""
    return _read(text, int, "a whole number")


def number(text: str) -> float:
    """A number."""
    return _read(text, float, "a number")


def several(read: Reader, count: int) -> Reader:
    """A reader of `count` values with commas between, "3,4" or "3x4" -> (3, 4)."""

    def reader(text: str) -> tuple:
        parts = text.replace("x", ",").split(",")
        if len(parts) != count:
            raise argparse.ArgumentTypeError(f"must be {count} values with commas between; got {text!r}")
        return tuple(read(part) for part in parts)

    return reader


def or_none(read: Reader) -> Reader:
    """A reader that also takes the word "none"."""
    return lambda text: None if text.lower() == "none" else read(text)


def heads(text: str) -> str | tuple[int, ...]:
    """The name of a reading of heads, or indices with commas between."""
    return tuple(whole(part) for part in text.split(",")) if text[:1].isdigit() else text


def lora(text: str) -> tuple[str, float]:
    """A LoRA's file and strength, "style.safetensors=0.8"; without one it is 1. Paths become absolute."""
    file, _, strength = text.rpartition("=")
    if not file or Path(text).is_file():
        file, strength = text, "1"
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"the LoRA {file} does not exist")
    return str(Path(file).resolve()), number(strength)


def as_text(value: object) -> str:
    """A value of a jobs file as it would be written on a command line."""
    if isinstance(value, list | tuple):
        return ",".join(as_text(item) for item in value)
    return "none" if value is None else str(value)


def _read(text: str, kind: type, name: str) -> object:
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be {name}; got {text!r}") from error
