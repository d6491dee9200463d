"""Kinds of values of single options: a step cache, the numbers of motion, an alignment."""

from collections.abc import Callable
from typing import Any, Protocol

from diffsynth.configs.caches import CACHES, CacheOptions
from diffsynth.configs.fields import Choice, Kind, Number, only_known, options_of
from diffsynth.configs.guidance import MotionGuidance

ALIGNMENTS = ("object", "none")


class CacheMaker(Protocol):
    """Interface of a caller's own step cache; see `caches.rules`."""

    make: Callable[[str, range, int], Any]


class CacheKind(Kind):
    """A step cache: a name, `CacheOptions` or an object with `make`; a name alone on the command line."""

    metavar = "NAME"

    def __str__(self) -> str:
        return f"one of {', '.join(CACHES)}, CacheOptions or an object with make(prompt, steps, num_steps)"

    def check(self, value: Any) -> Any:
        if value is None or isinstance(value, CacheOptions) or hasattr(value, "make"):
            return value
        return Choice(CACHES).check(value)


class MotionKind(Kind):
    """The numbers of motion transfer; on the command line each number is a separate option."""

    metavar = "NUMBERS"

    def __str__(self) -> str:
        return "a MotionGuidance or None"

    def check(self, value: Any) -> MotionGuidance | None:
        if value is not None and not isinstance(value, MotionGuidance):
            raise ValueError
        return value


class MotionChanges(Kind):
    """Numbers of motion by name, as a mapping or a text such as "lr=0.002,0.001 amf_weight=3"."""

    metavar = "NAME=VALUE..."
    _of_both = ("mode", "variant", "checkpoint", "guided", "guided_steps", "first_guided")

    def __str__(self) -> str:
        return f"numbers of motion by name, but {', '.join(self._of_both)}"

    def read(self, text: str) -> dict[str, Any]:
        stated, numbers = options_of(MotionGuidance), dict(part.split("=", 1) for part in text.split())
        only_known(numbers, MotionGuidance, "motion")
        return self.check({name: stated[name][0].kind.read(number) for name, number in numbers.items()})

    def check(self, value: Any) -> dict[str, Any]:
        if set(self._of_both).intersection(value):
            raise ValueError
        checked = MotionGuidance(**value)
        return {name: getattr(checked, name) for name in value}


class AlignmentKind(Kind):
    """How a reference is laid onto a picture: "object", "none", or numbers for `planning.alignment.shift`."""

    metavar = "object|none|DX,DY[,SCALE]"

    def __str__(self) -> str:
        return "object, none, or pixels to the right, pixels down and, if wanted, a scale from 0.1 to 10"

    def read(self, text: str) -> str | tuple[float, ...]:
        return self.check(text if text in ALIGNMENTS else [float(part) for part in text.split(",")])

    def check(self, value: Any) -> str | tuple[float, ...]:
        if isinstance(value, str):
            return Choice(ALIGNMENTS).check(value)
        right, down, scale = value if len(value) == 3 else (*value, 1.0)
        offset = Number(least=-16384, most=16384)
        return offset.check(right), offset.check(down), Number(least=0.1, most=10).check(scale)
