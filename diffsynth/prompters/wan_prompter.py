"""Turn prompts into the text rows that the DiT reads: clean, tokenise, encode with UMT5, pad with zeros.

Each prompt is encoded at its own length: padding does not change the tokens before it, so a prompt of 20
tokens does not need 512 positions. Results are cached.
"""

import html
import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from diffsynth.prompters.tokenizer import WanTokenizer, cut

logger = logging.getLogger(__name__)

DEFAULT_CACHE_SIZE = 64  # prompts; each takes at most 4 MB with umt5-xxl in bfloat16 (8 kB a token)
_Key = tuple[tuple[int, ...], torch.dtype, int]


class TextEncoder(Protocol):
    """Interface that the prompter needs of a text encoder; see `WanTextEncoder`."""

    vocab: int
    dim: int
    num_loads: int

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __call__(self, ids: Tensor) -> Tensor: ...


def clean_prompt(text: str) -> str:
    """Clean a prompt as the official code does: repair Unicode, decode HTML entities, join white space."""
    if not isinstance(text, str):
        raise TypeError(f"prompt must be a str; got {text!r}")
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class WanPrompter:
    """Encodes prompts and caches the last `cache_size` results of each text encoder.

    Results are kept on the CPU, without their zero rows, as long as their encoder lives; the encoder's
    `load_state_dict` invalidates them. After changing weights in any other way, call `clear`.

    Args:
        tokenizer: tokenizer of the text encoder.
        text_len: number of rows that the DiT reads, 512 in every Wan2.1 model.
        cache_size: number of results that are kept for each text encoder.
    """

    def __init__(
        self, tokenizer: WanTokenizer, text_len: int = 512, cache_size: int = DEFAULT_CACHE_SIZE
    ) -> None:
        for name, value in (("text_len", text_len), ("cache_size", cache_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.tokenizer, self.text_len, self.cache_size = tokenizer, text_len, cache_size
        self._results: WeakKeyDictionary[TextEncoder, OrderedDict[_Key, Tensor]] = WeakKeyDictionary()

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], text_encoder: TextEncoder) -> Tensor:
        """Encode one prompt or several as rows [B, text_len, dim], in the encoder's dtype and on its device.

        Rows after a prompt's own length are zero. A prompt of more than text_len tokens is cut, with a
        warning.

        Raises:
            TypeError: a prompt is not a str.
            ValueError: the list is empty, or the encoder does not know a token of the tokenizer.
            RuntimeError: the encoder gives values that are not finite.
        """
        sequences, most = self._tokenise(prompt), self.text_len
        shape = len(sequences), most, text_encoder.dim
        rows = torch.zeros(shape, dtype=text_encoder.dtype, device=text_encoder.device)
        for i, ids in enumerate(sequences):
            if (over := len(ids) - most) > 0:
                told = "prompt %d has %d tokens; the last %d are cut, %d are used"
                logger.warning(told, i, len(ids), over, most)
            used = cut(ids, most)
            rows[i, : len(used)] = self._encode(used, text_encoder)
        return rows

    def cached(self, prompt: str | Sequence[str], text_encoder: TextEncoder) -> bool:
        """Return whether the cache holds all results, so that `encode_prompt` would not run the encoder."""
        results = self._results.get(text_encoder, OrderedDict())
        return all(_key(cut(ids, self.text_len), text_encoder) in results for ids in self._tokenise(prompt))

    def clear(self) -> None:
        """Forget all results."""
        self._results.clear()

    def _tokenise(self, prompt: str | Sequence[str]) -> list[list[int]]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
            raise TypeError(f"prompt must be a str or a list of str; got {prompt!r}")
        if not prompts:
            raise ValueError("prompt must hold at least one text; got an empty list")
        return self.tokenizer([clean_prompt(text) for text in prompts], max_length=None)

    def _encode(self, ids: list[int], text_encoder: TextEncoder) -> Tensor:
        """Return the rows [len(ids), dim] of a prompt, on the CPU."""
        results = self._results.setdefault(text_encoder, OrderedDict())
        key = _key(ids, text_encoder)
        if key in results:
            results.move_to_end(key)
            return results[key]
        if max(ids) >= text_encoder.vocab:
            raise ValueError(
                f"{self.tokenizer.file} does not belong to this text encoder: "
                f"it gives token {max(ids)}, but the encoder has only {text_encoder.vocab} tokens"
            )
        rows = text_encoder(torch.tensor([ids], device=text_encoder.device))[0].cpu()
        if not rows.isfinite().all():
            raise RuntimeError(
                f"the text encoder gave values that are not finite in {text_encoder.dtype}; "
                "load it in bfloat16 or float32"
            )
        results[key] = rows
        if len(results) > self.cache_size:
            results.popitem(last=False)
        return rows


def _key(ids: list[int], text_encoder: TextEncoder) -> _Key:
    return tuple(ids), text_encoder.dtype, text_encoder.num_loads
