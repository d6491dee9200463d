"""One attention function over several kernels.

A backend states facts (devices, dtypes, whether it has a backward pass, why it cannot be used here); one of
another package is tried on a small call. The choice is made once a kind of input and logged. Precedence: the
argument, `use_attention`, the environment variable DIFFSYNTH_ATTENTION, the first usable backend. A named one
that cannot be used raises, except that a forward-only one leaves calls that need a gradient to the automatic
choice, which never fails, because `sdpa` serves everything.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

HALF_TYPES = (torch.float16, torch.bfloat16)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flash_attn(release: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if release == 2:  # by statements: compiled code cannot call import_module
        from flash_attn import flash_attn_func
    else:
        from flash_attn_interface import flash_attn_func
    exact = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    out = flash_attn_func(q, k, v, **exact)
    # Releases differ in whether the log-sum-exp comes along.
    return out[0] if isinstance(out, tuple) else out


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBackend:
    """Facts about one kernel: the package that it needs, devices and dtypes (None where all will do)."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    module: str | None = None
    install: str = ""
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    max_head_dim: int | None = None
    differentiable: bool = True

    def refusal(self, device: str, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
        """Why this backend cannot serve such a call; None if it can."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"package {self.module!r} is not installed ({self.install})"
        if self.devices is not None and device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {', '.join(str(d) for d in self.dtypes)}, not {dtype}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"takes a head width of at most {self.max_head_dim}, not {head_dim}"
        if needs_grad and not self.differentiable:
            return "has no backward pass, and this call needs a gradient"
        return None if self.module is None else _trial(self, device, dtype, head_dim, needs_grad)


def capability(device: str) -> tuple[int, int]:
    """Return the compute capability of the current CUDA device; of other devices (0, 0)."""
    return torch.cuda.get_device_capability() if device == "cuda" else (0, 0)


@lru_cache
def _trial(
    backend: AttentionBackend, device: str, dtype: torch.dtype, head_dim: int, needs_grad: bool
) -> str | None:
    """What a small call raises, such as a package built for another PyTorch; None if it works."""
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(needs_grad):
            q, k, v = torch.ones(3, 1, 16, 1, head_dim, device=device, dtype=dtype).unbind()
            out = backend.run(q.requires_grad_(needs_grad), k, v).float().sum()
            (torch.autograd.grad(out, q)[0].float().sum() if needs_grad else out).item()
    except Exception as error:  # noqa: BLE001 - whatever the package may raise
        told = f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        logger.warning("the attention kernel of package %r is installed but %s", backend.module, told)
        return told
    return None


_HALF_ON_CUDA: dict[str, Any] = {"devices": ("cuda",), "dtypes": HALF_TYPES}
# In order of preference.
BACKENDS: dict[str, AttentionBackend] = {
    "flash_attn_3": AttentionBackend(
        run=partial(_flash_attn, 3),
        module="flash_attn_interface",
        install="build it from the hopper folder of the flash-attention repository",
        **_HALF_ON_CUDA,
        max_head_dim=256,
    ),
    "flash_attn_2": AttentionBackend(
        run=partial(_flash_attn, 2),
        module="flash_attn",
        install="pip install flash-attn --no-build-isolation",
        **_HALF_ON_CUDA,
        max_head_dim=256,
    ),
    "sdpa": AttentionBackend(run=_sdpa),
    "sage": AttentionBackend(
        run=_sage,
        module="sageattention",
        install="pip install sageattention",
        **_HALF_ON_CUDA,
        max_head_dim=128,
        differentiable=False,
    ),
}

_chosen: ContextVar[str | None] = ContextVar("attention_backend", default=None)


def check_backend_name(name: str) -> str:
    """Return the name of an attention backend; ValueError that lists the known ones, if it is unknown."""
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_attention(name: str) -> Iterator[None]:
    """Return a context in which attention runs on the named backend; ValueError if the name is unknown."""
    token = _chosen.set(check_backend_name(name))
    try:
        yield
    finally:
        _chosen.reset(token)


@lru_cache
def _resolve(
    name: str | None, device: str, dtype: torch.dtype, head_dim: int, needs_grad: bool
) -> AttentionBackend:
    wanted = (device, dtype, head_dim, needs_grad)
    if name is not None:
        backend = BACKENDS[check_backend_name(name)]
        if needs_grad and not backend.differentiable:
            logger.warning("attention backend %r has no backward pass: with a gradient another is used", name)
        elif reason := backend.refusal(*wanted):
            raise ValueError(f"attention backend {name!r} cannot be used: {reason}")
        else:
            return backend
    # From Hopper on, PyTorch's own attention is cuDNN's, faster than the second FlashAttention.
    hopper = capability(device) >= (9, 0)
    for candidate in sorted(BACKENDS, key=lambda name: hopper and name == "flash_attn_2"):
        if BACKENDS[candidate].refusal(*wanted) is None:
            logger.info("attention on %s in %s (gradient: %s): %s", device, dtype, needs_grad, candidate)
            return BACKENDS[candidate]
    raise AssertionError("sdpa serves every call")


def choose_attention(
    device: str, dtype: torch.dtype, head_dim: int, needs_grad: bool, name: str | None = None
) -> AttentionBackend:
    """Return the backend for such inputs; ValueError if the named one is unknown or cannot serve them."""
    name = name or _chosen.get() or os.environ.get("DIFFSYNTH_ATTENTION") or None
    return _resolve(name, device, dtype, head_dim, needs_grad)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | AttentionBackend | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, unmasked.

    Args:
        q: [B, S, N, D] (batch, tokens, heads, head width).
        k, v: [B, L, N, D].
        backend: name of a kernel, which takes precedence over `use_attention`; or the kernel that
            `choose_attention` returned, as compiled code cannot choose one.

    Returns:
        [B, S, N, D].

    Raises:
        ValueError: a backend that was named is unknown, or cannot serve these inputs.
    """
    if not isinstance(backend, AttentionBackend):
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        backend = choose_attention(q.device.type, q.dtype, q.shape[-1], needs_grad, backend)
    return backend.run(q, k, v)
