"""State an option once, as a dataclass field that carries the kind of its values and its help.

A kind says which values are allowed, how text becomes one, and how both are described to a user. Command
line, page, batch files, records and the tables of the documentation are made from these fields.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from importlib import import_module
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Protocol, TypeVar

Owner = TypeVar("Owner")
OPTION = "option"  # key of an `Option` in the metadata of a dataclass field
_COUNTS = {2: "two", 3: "three"}


class Kind(Protocol):
    """The values that an option may take; str(kind) describes them, as in "must be {kind}"."""

    @property
    def metavar(self) -> str:
        """Placeholder of a value in the help of the command line."""

    def read(self, text: str) -> Any:
        """Parse a value; ValueError if the text is not an allowed value."""
        return self.check(text)

    def check(self, value: Any) -> Any:
        """Return an allowed value, converted to the type of the kind.

        Raises:
            ValueError, TypeError: the value is not allowed.
        """


@dataclass(frozen=True, slots=True)
class Whole:
    """Whole numbers, NumPy's among them."""

    least: int = 1
    most: int | None = None
    odd: bool = False
    metavar: str = "N"

    def __str__(self) -> str:
        bounds = f"of at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"
        return f"{'an odd' if self.odd else 'a'} whole number {bounds}"

    def read(self, text: str) -> int:
        return self.check(int(text))

    def check(self, value: Any) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError
        number = int(value)
        within = number >= self.least and (self.most is None or number <= self.most)
        if not within or (self.odd and number % 2 == 0):
            raise ValueError
        return number


@dataclass(frozen=True, slots=True)
class Number:
    """Finite numbers; `above` is a bound that is not itself allowed, `least` and `most` are."""

    above: float | None = None
    least: float | None = None
    most: float | None = None
    metavar: str = "X"

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.least, "at most": self.most}
        told = [f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None]
        return " ".join(["a finite number", ", ".join(told)]).strip()

    def read(self, text: str) -> float:
        return self.check(float(text))

    def check(self, value: Any) -> float:
        good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not good or (self.above is not None and value <= self.above):
            raise ValueError
        if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
            raise ValueError
        return value if isinstance(value, int | float) else float(value)


@dataclass(frozen=True, slots=True)
class Text(Kind):
    """Text of at most `longest` characters."""

    longest: int = 1000
    metavar: str = "TEXT"

    def __str__(self) -> str:
        return f"text of at most {self.longest} characters"

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or len(value) > self.longest:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class Choice(Kind):
    """One of some known names, or of the keys of a registry, also of those that join it later."""

    known: Collection[str]
    metavar: str = "NAME"

    def __str__(self) -> str:
        return f"one of {', '.join(self.known)}"

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.known:
            raise ValueError
        return value


class Switch(Kind):
    """True or False."""

    metavar = "ON"

    def __str__(self) -> str:
        return "True or False"

    def read(self, text: str) -> bool:
        words = {"true": True, "yes": True, "on": True, "1": True}
        words |= {"false": False, "no": False, "off": False, "0": False}
        return self.check(words.get(text.lower()))

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool) and str(getattr(value, "dtype", "")) != "bool":
            raise ValueError
        return bool(value)


@dataclass(frozen=True, slots=True)
class Several:
    """A fixed number of values of one kind, with a name for each."""

    kind: Kind
    names: Sequence[str]

    @property
    def metavar(self) -> str:
        return ",".join(name.upper() for name in self.names)

    def __str__(self) -> str:
        return f"{_COUNTS[len(self.names)]} values ({', '.join(self.names)}), each {self.kind}"

    def read(self, text: str) -> tuple[Any, ...]:
        return self.check([self.kind.read(part) for part in text.replace("x", ",").split(",")])

    def check(self, value: Any) -> tuple[Any, ...]:
        parts = list(value)
        if isinstance(value, str | Mapping) or len(parts) != len(self.names):
            raise ValueError
        return tuple(self.kind.check(part) for part in parts)


class Levels(Kind):
    """Noise levels that fall from 1 or below to above 0."""

    metavar = "X,X,..."

    def __str__(self) -> str:
        return "falling numbers above 0, at most 1"

    def read(self, text: str) -> tuple[float, ...]:
        return self.check([float(part) for part in text.split(",")])

    def check(self, value: Any) -> tuple[float, ...]:
        levels = tuple(Number(above=0, most=1).check(level) for level in value)
        if not levels or any(level <= following for level, following in pairwise(levels)):
            raise ValueError
        return levels


@dataclass(frozen=True, slots=True)
class OrNone:
    """Values of a kind, or None; `none` describes what None stands for."""

    kind: Kind
    none: str = ""

    @property
    def metavar(self) -> str:
        return self.kind.metavar

    def __str__(self) -> str:
        return f"{self.kind} or None"

    def read(self, text: str) -> Any:
        return None if text.lower() == "none" else self.kind.read(text)

    def check(self, value: Any) -> Any:
        return None if value is None else self.kind.check(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """Description of an option, kept in the metadata of its field.

    Attributes:
        kind: the values that it may take.
        help: its meaning and unit; part of a sentence.
        short: a shorter name on the command line.
    """

    kind: Kind
    help: str
    short: str | None = None


def option(kind: Kind, text: str, *, default: Any = None, short: str | None = None) -> Any:
    """Return a dataclass field for an option of this kind, with its help text and default."""
    return field(default=default, metadata={OPTION: Option(kind=kind, help=text, short=short)})


def options_of(owner: type) -> dict[str, tuple[Option, Any]]:
    """Return name -> (option, default) for the options of a dataclass, in order."""
    stated: Sequence[Field[Any]] = fields(owner)
    return {item.name: (item.metadata[OPTION], item.default) for item in stated if OPTION in item.metadata}


def describe(owner: type) -> None:
    """Add the options of a dataclass to its docstring, one a line, for `help()`."""
    rows = (
        f"\n        {n} = {default!r}: {o.help}; {o.kind}" for n, (o, default) in options_of(owner).items()
    )
    owner.__doc__ = f"{(owner.__doc__ or '').rstrip()}\n\n    Options:{''.join(rows)}\n    "


def fields_of(owner: type[Owner], values: Mapping[str, Any]) -> Owner:
    """Return a dataclass of options with those of its fields that are named among other values."""
    stated: Sequence[Field[Any]] = fields(owner)  # type: ignore[arg-type]  # a dataclass
    return owner(**{item.name: values[item.name] for item in stated if item.name in values})


def check_value(name: str, kind: Kind, value: Any, *, as_text: bool = False) -> Any:
    """Return a value in its own type, parsed if it is given as text.

    Raises:
        ValueError: the value is not allowed; the message names the option and what is allowed.
    """
    try:
        return kind.read(value) if as_text else kind.check(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be {kind}; got {value!r:.80}") from error


def check_options(owner: Any) -> None:
    """Replace each option of a frozen dataclass by its checked value; for `__post_init__`."""
    for name, (stated, _default) in options_of(type(owner)).items():
        object.__setattr__(owner, name, check_value(name, stated.kind, getattr(owner, name)))


def load(path: str) -> Any:
    """Import the object "package.module:name"; registries hold such paths so that imports happen on use."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def only_known(values: Mapping[str, Any], owner: type, what: str) -> None:
    """Check the names in a mapping; ValueError that names those that are no field of a dataclass."""
    if unknown := sorted(values.keys() - {item.name for item in fields(owner)}):
        raise ValueError(f"{what} has no field {', '.join(unknown)}")
