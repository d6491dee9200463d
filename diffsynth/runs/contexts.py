"""Which texts a run reads, and their embeddings, prompt by prompt."""

from typing import NamedTuple

from torch import Tensor


class Contexts(NamedTuple):
    """Text embeddings [1, text_len, text_dim] of one run: prompt, negative prompt, empty prompt."""

    positive: Tensor
    negative: Tensor | None = None
    null: Tensor | None = None


def texts_to_encode(
    prompts: list[str], negatives: list[str], with_negative: bool, with_null: bool
) -> dict[str, list[str]]:
    """The texts by the fields of `Contexts`, only those that are read, one a prompt."""
    texts = {"positive": prompts}
    if with_negative:
        texts["negative"] = negatives
    if with_null:
        texts["null"] = [""] * len(prompts)
    return texts


def contexts_of(texts: dict[str, list[str]], rows: Tensor) -> list[Contexts]:
    """Embeddings [texts, text_len, text_dim], field after field -> one Contexts a prompt."""
    count = len(texts["positive"])
    groups = dict(zip(texts, rows.unflatten(0, (len(texts), count)), strict=True))
    return [Contexts(**{name: group[i : i + 1] for name, group in groups.items()}) for i in range(count)]
