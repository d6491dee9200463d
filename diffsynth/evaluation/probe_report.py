"""What a motion probe found: the best readings, a table, a heat map, files, and settings for guidance.

Axes of the arrays: blocks, readings (heads by number, then the head averages by name), sigmas, taus.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEAD_MEANS = ("mean_qk", "mean_logits")
ARRAYS = ("correlation", "slope", "partial_correlation", "partial_slope")
KINDS = ("partial", "whole")
# Noise levels at which guidance acts.
GUIDED_SIGMAS = (0.5, 0.95)
JSON_NAME, TABLE_NAME, IMAGE_NAME = "probe.json", "probe.md", "probe.png"

CELL = (66, 18)  # pixels, (width, height)
LABELS, TITLE, MARGIN = 60, 18, 12
MOST_WIDE = 2400
# Colours of correlation 1 and -1; 0 is white.
POSITIVE, NEGATIVE = (178, 24, 43), (33, 102, 172)
INK, PAPER = (30, 30, 30), (255, 255, 255)

# All noise levels, one of them, or those from a lowest to a highest.
SigmaChoice = float | tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRow:
    """A way to read motion. heads: as `MotionGuidance` takes them. correlation, slope: means over sigmas."""

    block: int
    heads: str | tuple[int, ...]
    tau: float
    sigmas: tuple[float, ...]
    correlation: float
    slope: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeResult:
    """How well each reading of each block follows true motion.

    correlation, slope, partial_correlation, partial_slope: float64 [blocks, readings, sigmas, taus] of read
    on true displacement (`probe_truth.Agreement`); a perfect reading has 1 in all. blocks, readings, sigmas,
    taus: what their axes are.
    blind: the correlation of attention that sees nothing (equal weights: the way to the picture's middle).
    It is far above 0, since what moves in a picture cannot but move inwards. The partial numbers leave that
    out, so these rank (kind="partial"); kind="whole" ranks by the plain ones.
    num_samples: tokens compared in each cell, over num_clips clips of size (frames, height, width).
    sf, tokens, prompt, seed: as probed. Raises ValueError if arrays and axes do not fit.
    """

    correlation: np.ndarray
    slope: np.ndarray
    partial_correlation: np.ndarray
    partial_slope: np.ndarray
    blocks: tuple[int, ...]
    readings: tuple[int | str, ...]
    sigmas: tuple[float, ...]
    taus: tuple[float, ...]
    blind: float
    num_clips: int
    num_samples: int
    size: tuple[int, int, int]
    sf: int
    tokens: str
    prompt: str
    seed: int

    def __post_init__(self) -> None:
        axes = tuple(map(len, (self.blocks, self.readings, self.sigmas, self.taus)))
        for name in ARRAYS:
            if getattr(self, name).shape != axes:
                raise ValueError(
                    f"{name} must be [blocks, readings, sigmas, taus] = {list(axes)}; "
                    f"got {list(getattr(self, name).shape)}"
                )

    def best(self, sigma: SigmaChoice = None, count: int | None = 1, kind: str = "partial") -> list[ProbeRow]:
        """The readings that follow motion best, best first, each at its best tau; `count` of them, or all.

        sigma: None for the mean over all noise levels, one of them, or (lowest, highest) for those between.
        The score is the correlation; where two are equal to two decimals, the slope nearer to 1 wins.
        Raises ValueError if no probed noise level is meant, or for an unknown kind.
        """
        rows = [
            min(self._at_each_tau(b, r, self._sigmas_at(sigma), kind), key=_rank)
            for b in range(len(self.blocks))
            for r in range(len(self.readings))
        ]
        return sorted(rows, key=_rank)[:count]

    def _at_each_tau(self, b: int, r: int, at: list[int], kind: str) -> list[ProbeRow]:
        correlation, slope = (values[b, r, at].mean(0) for values in self._values(kind))
        reading = self.readings[r]
        return [
            ProbeRow(
                block=self.blocks[b],
                heads=reading if isinstance(reading, str) else (reading,),
                tau=tau,
                sigmas=tuple(self.sigmas[s] for s in at),
                correlation=float(correlation[t]),
                slope=float(slope[t]),
            )
            for t, tau in enumerate(self.taus)
        ]

    def _values(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Correlations and slopes of a kind."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if kind == "whole":
            return self.correlation, self.slope
        return self.partial_correlation, self.partial_slope

    def _sigmas_at(self, sigma: SigmaChoice) -> list[int]:
        if sigma is None:
            return list(range(len(self.sigmas)))
        low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
        at = [index for index, probed in enumerate(self.sigmas) if low <= probed <= high]
        if not at:
            raise ValueError(f"sigma must mean some of the probed {self.sigmas}; got {sigma!r}")
        return at

    def table(self, count: int | None = None, sigma: SigmaChoice = None, kind: str = "partial") -> str:
        """Markdown: a row for each block and reading at its best tau, best first, as `best` ranks them.

        count: rows, all by default. Cells are correlation / slope of a kind at each noise level, then their
        means over `sigma`.
        """
        correlation, slope = self._values(kind)
        frames, height, width = self.size
        blind = 0 if kind == "partial" else self.blind
        head = ["block", "heads", "tau", *(f"sigma {s:g}" for s in self.sigmas), "mean"]
        lines = [
            f"Displacement read by attention against the true one: {kind} correlation / slope. "
            f"Seeing nothing has correlation {blind:.2f}.",
            f"{self.num_clips} clips of {frames} frames, {height}x{width}; {self.num_samples} tokens "
            f"({self.tokens}), sf={self.sf}, prompt {self.prompt!r}, seed {self.seed}.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'--:|' * len(head)}",
        ]
        for row in self.best(sigma, count, kind):
            reading = row.heads if isinstance(row.heads, str) else row.heads[0]
            b, r, t = self.blocks.index(row.block), self.readings.index(reading), self.taus.index(row.tau)
            cells = [
                *zip(correlation[b, r, :, t], slope[b, r, :, t], strict=True),
                (row.correlation, row.slope),
            ]
            texts = [
                str(row.block),
                _name(reading),
                f"{row.tau:g}",
                *(f"{c:.2f} / {m:.2f}" for c, m in cells),
            ]
            lines.append(f"| {' | '.join(texts)} |")
        return "\n".join(lines) + "\n"

    def heat_map(self, tau: float | None = None, kind: str = "partial") -> Image.Image:
        """Correlations of a kind, blocks by readings, a panel for each noise level; the best has a frame.

        tau: one of the probed ones; by default each cell shows its best tau at that noise level.
        Raises ValueError for a tau that was not probed.
        """
        if tau is not None and tau not in self.taus:
            raise ValueError(f"tau must be one of the probed {self.taus}; got {tau!r}")
        correlation = self._values(kind)[0]
        shown = correlation.max(-1) if tau is None else correlation[..., self.taus.index(tau)]
        return _draw_panels(
            np.moveaxis(shown, 2, 0),
            [f"sigma {sigma:g}" for sigma in self.sigmas],
            [f"block {block}" for block in self.blocks],
            [_name(reading) for reading in self.readings],
            f"{kind} correlation of read and true motion, "
            + ("each cell at its best tau" if tau is None else f"tau {tau:g}"),
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write probe.json, probe.md and probe.png into a folder, over those there; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: values[name].tolist() for name in ARRAYS}
        paths = [folder / name for name in (JSON_NAME, TABLE_NAME, IMAGE_NAME)]
        paths[0].write_text(json.dumps(values))
        paths[1].write_text(f"{self.table()}\n{self.table(kind='whole')}")
        self.heat_map().save(paths[2])
        return paths

    @classmethod
    def load(cls, path: str | Path) -> "ProbeResult":
        """The result saved in a folder, or in its probe.json.

        Raises FileNotFoundError if there is none, ValueError if the file holds something else.
        """
        path = Path(path)
        path = path / JSON_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; write it by ProbeResult.save")
        values = json.loads(path.read_text())
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise ValueError(f"{path} holds no probe result: it must have {', '.join(names)}")
        values |= {name: np.array(values[name], np.float64) for name in ARRAYS}
        values |= {name: tuple(values[name]) for name in names if isinstance(values[name], list)}
        return cls(**values)


def suggest(result: ProbeResult, sigma: SigmaChoice = GUIDED_SIGMAS) -> dict[str, object]:
    """Fields of `MotionGuidance` that read motion best over noise levels (by default where guidance acts):
    block, heads, tau. Raises ValueError if no noise level there was probed.
    """
    row = result.best(sigma)[0]
    return {"block": row.block, "heads": row.heads, "tau": row.tau}


def _rank(row: ProbeRow) -> tuple[float, float]:
    return -round(row.correlation, 2), abs(row.slope - 1)


def _name(reading: int | str) -> str:
    return reading if isinstance(reading, str) else f"head {reading}"


def _draw_panels(
    values: np.ndarray, titles: list[str], rows: list[str], cols: list[str], headline: str
) -> Image.Image:
    """Values in [-1, 1], [panels, rows, columns], as tables of colours, as many side by side as fit."""
    panel = (LABELS + len(cols) * CELL[0] + MARGIN, 2 * TITLE + len(rows) * CELL[1] + MARGIN)
    beside = max(1, min(len(values), MOST_WIDE // panel[0]))
    font = ImageFont.load_default()
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(beside * panel[0], int(probe.textlength(headline, font)) + 2 * MARGIN)
    image = Image.new("RGB", (width, TITLE + MARGIN + -(-len(values) // beside) * panel[1]), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 4), headline, INK, font)
    best = np.unravel_index(values.argmax(), values.shape)
    for index, (table, title) in enumerate(zip(values, titles, strict=True)):
        left = (index % beside) * panel[0]
        top = TITLE + MARGIN + (index // beside) * panel[1]
        draw.text((left + LABELS, top + 3), title, INK, font)
        for col, name in enumerate(cols):
            _centred(draw, (left + LABELS + col * CELL[0], top + TITLE), name, INK, font)
        for row, name in enumerate(rows):
            y = top + 2 * TITLE + row * CELL[1]
            draw.text((left + MARGIN, y + 3), name, INK, font)
            for col, value in enumerate(table[row]):
                x = left + LABELS + col * CELL[0]
                edge = INK if (index, row, col) == best else None
                draw.rectangle(
                    (x, y, x + CELL[0] - 2, y + CELL[1] - 2), _colour(value), edge, 2 if edge else 0
                )
                _centred(draw, (x, y), f"{value:.2f}", PAPER if abs(value) > 0.6 else INK, font)
    return image


def _centred(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour: tuple, font: ImageFont.ImageFont
) -> None:
    """Text in the middle of the cell whose upper left corner is given."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    x = corner[0] + (CELL[0] - 1 - right - left) / 2
    draw.text((x, corner[1] + (CELL[1] - 1 - bottom - top) / 2), text, colour, font)


def _colour(value: float) -> tuple[int, int, int]:
    full = np.array(POSITIVE if value > 0 else NEGATIVE)
    red, green, blue = (np.array(PAPER) + abs(value) * (full - PAPER)).round().astype(int)
    return int(red), int(green), int(blue)
