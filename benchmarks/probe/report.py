"""The result of a motion probe: the best readings, a table, a heat map, files, settings for guidance.

Axes of the arrays: blocks, readings (heads by number, then the head averages by name), sigmas, taus.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffsynth.evaluation.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD_MEANS = ("mean_qk", "mean_logits")
ARRAYS = ("correlation", "slope", "partial_correlation", "partial_slope")
KINDS = ("partial", "whole")
# Noise levels at which guidance acts.
GUIDED_SIGMAS = (0.5, 0.95)
_WIDEST = 11.5  # inches of a figure: on a page 900 pixels wide its numbers can still be read
JSON_NAME, TABLE_NAME, IMAGE_NAME = "probe.json", "probe.md", "probe.png"

# All noise levels, one of them, or those from a lowest to a highest.
SigmaChoice = float | tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRow:
    """One way to read motion, and how well it follows true motion.

    Attributes:
        block: of the DiT, from 0.
        heads: as `MotionGuidance` takes them.
        tau: factor on the logits.
        sigmas: noise levels of the means below.
        correlation: of read and true displacement, mean over sigmas.
        slope: of read on true displacement, mean over sigmas.
    """

    block: int
    heads: str | tuple[int, ...]
    tau: float
    sigmas: tuple[float, ...]
    correlation: float
    slope: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeResult:
    """Agreement of each reading of each block with true motion.

    A perfect reading has 1 in all four arrays, float64 [blocks, readings, sigmas, taus], of read on true
    displacement (see `truth.Agreement`). Attention that sees nothing (equal weights: the way to the
    picture's middle) has a correlation far above 0, since what moves in a picture cannot but move inwards.
    The partial numbers leave that out, so these rank (kind="partial"); kind="whole" ranks by the plain ones.

    Attributes:
        correlation: the plain correlations.
        slope: the plain slopes.
        partial_correlation: correlations without what attention that sees nothing predicts.
        partial_slope: slopes without that.
        blocks: of the DiT, from 0.
        readings: heads by number, then the averages over heads by name.
        sigmas: noise levels.
        taus: factors on the logits.
        blind: the plain correlation of attention that sees nothing.
        num_clips: how many clips were read.
        num_samples: tokens compared in each cell.
        size: (frames, height, width) of the clips.
        sf: pairs of latent frames up to sf - 1 apart were compared.
        tokens: "object" or "all".
        prompt: "" or "caption".
        seed: of clips and noise.

    Raises:
        ValueError: arrays and axes do not fit.
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
        """Return the readings that follow motion best, best first, each at its best tau.

        The score is the correlation; where two are equal to two decimals, the slope nearer to 1 wins.

        Args:
            sigma: None for the mean over all noise levels, one of them, or (lowest, highest) for a range.
            count: how many readings; None for all.
            kind: "partial" or "whole".

        Raises:
            ValueError: no probed noise level is in the range, or the kind is unknown.
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
        """Return correlations and slopes of a kind."""
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
        """Return a Markdown table of each block and reading at its best tau, in the order of `best`.

        Cells are correlation / slope at each noise level, then their means over `sigma`.

        Args:
            count: number of rows; None for all.
            sigma: as for `best`.
            kind: as for `best`.
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
            numbers = [*zip(correlation[b, r, :, t], slope[b, r, :, t], strict=True)]
            cells = [f"{c:.2f} / {m:.2f}" for c, m in (*numbers, (row.correlation, row.slope))]
            lines.append(f"| {' | '.join([str(row.block), _name(reading), f'{row.tau:g}', *cells])} |")
        return "\n".join(lines) + "\n"

    def heat_map(self, tau: float | None = None, kind: str = "partial") -> "Figure":
        """Draw correlations, blocks by readings, with a panel for each noise level; the best has a frame.

        Args:
            tau: one of the probed ones; None shows in each cell its best tau at that noise level.
            kind: "partial" or "whole".

        Returns:
            A matplotlib figure.

        Raises:
            ValueError: the tau was not probed, or the kind is unknown.
            ImportError: matplotlib is not installed.
        """
        if tau is not None and tau not in self.taus:
            raise ValueError(f"tau must be one of the probed {self.taus}; got {tau!r}")
        correlation = self._values(kind)[0]
        shown = correlation.max(-1) if tau is None else correlation[..., self.taus.index(tau)]
        return heat_maps(
            np.moveaxis(shown, 2, 0),
            [f"sigma {sigma:g}" for sigma in self.sigmas],
            [f"block {block}" for block in self.blocks],
            [_name(reading) for reading in self.readings],
            f"{kind} correlation of read and true motion, "
            + ("each cell at its best tau" if tau is None else f"tau {tau:g}"),
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write probe.json, probe.md and probe.png into a folder; existing ones are replaced.

        Returns:
            Their paths.

        Raises:
            ImportError: matplotlib is not installed; the first two files are written all the same.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: values[name].tolist() for name in ARRAYS}
        paths = [folder / name for name in (JSON_NAME, TABLE_NAME, IMAGE_NAME)]
        paths[0].write_text(json.dumps(values))
        paths[1].write_text(f"{self.table()}\n{self.table(kind='whole')}")
        self.heat_map().savefig(paths[2])
        return paths

    @classmethod
    def load(cls, path: str | Path) -> "ProbeResult":
        """Read the result saved in a folder.

        Args:
            path: the folder, or the probe.json in it.

        Raises:
            FileNotFoundError: there is no result.
            ValueError: the file holds something else.
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
    """Return the fields of `MotionGuidance` that read motion best: block, heads and tau.

    Args:
        result: of `probe_motion`.
        sigma: the noise levels that count, as for `ProbeResult.best`; by default those where guidance acts.

    Raises:
        ValueError: no noise level there was probed.
    """
    row = result.best(sigma)[0]
    return {"block": row.block, "heads": row.heads, "tau": row.tau}


def _rank(row: ProbeRow) -> tuple[float, float]:
    return -round(row.correlation, 2), abs(row.slope - 1)


def _name(reading: int | str) -> str:
    return reading if isinstance(reading, str) else f"head {reading}"


def heat_maps(
    values: np.ndarray, titles: Sequence[str], rows: Sequence[str], columns: Sequence[str], headline: str
) -> "Figure":
    """Draw tables of correlations as colours with their numbers; the highest of all has a frame.

    Args:
        values: [panels, rows, columns] in [-1, 1]; 1 is red, 0 white, -1 blue.
        titles: one for each panel.
        rows: names of the rows.
        columns: names of the columns.
        headline: above all panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    width, height = 1 + 0.66 * len(columns), 0.8 + 0.25 * len(rows)
    beside = max(1, min(len(values), int(_WIDEST // width)))
    below = -(-len(values) // beside)
    figure = new_figure(beside * width, 0.4 + below * height)
    figure.suptitle(headline)
    best = np.unravel_index(values.argmax(), values.shape)
    for index, (table, title) in enumerate(zip(values, titles, strict=True)):
        axes = figure.add_subplot(below, beside, index + 1, title=title)
        axes.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        for row, column in np.ndindex(*table.shape):
            value = table[row, column]
            ink = "white" if abs(value) > 0.6 else "black"
            frame = {"fill": False, "edgecolor": ink} if (index, row, column) == best else None
            axes.text(
                column, row, f"{value:.2f}", color=ink, fontsize=8, ha="center", va="center", bbox=frame
            )
    return figure
