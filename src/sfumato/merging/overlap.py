"""What clashes: how much of their inputs and outputs two adapters share, and where they pull apart, from factors alone.

Measured per block, before anything is drawn. All figures are of deltas with their weights.

The figures of `overlap` as a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato.adapters.weights import format_weight, weight_at
from sfumato.errors import AdapterError
from sfumato.files.kinds.ia3 import extract_command
from sfumato.files.module_names import Target, block_of, block_order
from sfumato.merging.factors import Factors, factored_svd, from_module, inner_product
from sfumato.merging.merge import MergeSource
from sfumato.utils.atomic import atomic_path

_NOISE = 1e-6
"""Singular values below this share of the first are rounding; a half's own is larger, but weighs by its energy."""


@dataclass(frozen=True)
class Pair:
    """Two adapters in one block.

    modules: that both change. cosine: of the two deltas, 1 where they push alike, -1 where they cancel. rows, columns:
    overlap of the input and output directions, 0 for none shared to 1 for the same ones; each direction counts by the
    energy that it has. row_angle, column_angle: the smallest angle between the two spaces, in degrees, of the module
    where it is least. energy: of both, in these modules. conflict: the share of it that the sum loses to cancellation.
    """

    first: str
    second: str
    block: str
    modules: int
    cosine: float
    rows: float
    columns: float
    row_angle: float
    column_angle: float
    energy: float
    conflict: float


def clashes(sources: Sequence[MergeSource]) -> list[Pair]:
    """Every pair of the adapters in every block that both change; blocks in the order of the model.

    Raises AdapterError for kinds without a low-rank form, for an adapter that changes nothing at its weight, and where
    no two adapters share a module.
    """
    factors = {source.name: _factors(source) for source in sources}
    for source in sources:
        if source.changes and not factors[source.name]:
            raise AdapterError(
                f"{source.name} changes nothing at its weight {format_weight(source.weight)}, so nothing can "
                f"clash with "
                "it. Give it another weight, or leave it out."
            )
    pairs = []
    for i, first in enumerate(sources):
        for second in sources[i + 1 :]:
            blocks: dict[str, list[tuple[_Decomposed, _Decomposed]]] = {}
            for target, one in factors[first.name].items():
                if (other := factors[second.name].get(target)) is not None:
                    _check_shapes(target, first.name, one, second.name, other)
                    blocks.setdefault(block_of(target), []).append((one, other))
            for block in sorted(blocks, key=block_order):
                pairs.append(_pair(first.name, second.name, block, blocks[block]))
    if not pairs:
        raise AdapterError("no two of the adapters change the same module, so nothing can clash; they mix as they are.")
    return pairs


def conflict_by_pair(pairs: Sequence[Pair]) -> dict[tuple[str, str], float]:
    """The conflict of each pair of adapters over all modules that both change."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        found.setdefault((pair.first, pair.second), []).append(pair)
    return {
        names: sum(pair.conflict * pair.energy for pair in of) / sum(pair.energy for pair in of)
        for names, of in found.items()
    }


@dataclass(frozen=True)
class _Decomposed:
    """A delta's SVD, without what is rounding. left: (out, k), values: (k,), right: (k, in)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    @property
    def energy(self) -> float:
        return float(self.values.square().sum())

    def factors(self) -> Factors:
        return Factors(self.left * self.values, self.right)


def _factors(source: MergeSource) -> dict[Target, _Decomposed]:
    found = {}
    for target, change in source.changes.items():
        module = change.low_rank()
        if module is None:
            raise AdapterError(
                f"{source.name}: {change.kind} in {'.'.join(target)} has no low-rank form, from which clashes are "
                f"read. Write it as a LoRA first: {extract_command(change)}."
            )
        u, s, vh = factored_svd(from_module(module, weight_at(source.weight, *target)))
        count = int((s > _NOISE * s[0]).sum()) if len(s) else 0
        if count:
            found[target] = _Decomposed(u[:, :count], s[:count], vh[:count])
    return found


def _check_shapes(target: Target, first: str, one: _Decomposed, second: str, other: _Decomposed) -> None:
    shapes = [(len(d.left), d.right.shape[1]) for d in (one, other)]
    if shapes[0] != shapes[1]:
        raise AdapterError(
            f"{'.'.join(target)} is {list(shapes[0])} in {first}, {list(shapes[1])} in {second}. "
            "They were trained for different bases."
        )


def _pair(first: str, second: str, block: str, modules: Sequence[tuple[_Decomposed, _Decomposed]]) -> Pair:
    inner = energy = product = conflict = rows = columns = 0.0
    row_angle = column_angle = 90.0
    energies = [0.0, 0.0]
    for one, other in modules:
        dot = inner_product(one.factors(), other.factors())
        inner += dot
        energies[0] += one.energy
        energies[1] += other.energy
        size = math.sqrt(one.energy * other.energy)
        product += size
        energy += one.energy + other.energy
        conflict += max(0.0, -2 * dot)
        for_rows, for_columns = one.right @ other.right.T, one.left.T @ other.left
        rows += size * _overlap(one, other, for_rows)
        columns += size * _overlap(one, other, for_columns)
        row_angle = min(row_angle, _angle(for_rows))
        column_angle = min(column_angle, _angle(for_columns))
    return Pair(
        first,
        second,
        block,
        len(modules),
        inner / math.sqrt(energies[0] * energies[1]),
        rows / product,
        columns / product,
        row_angle,
        column_angle,
        energy,
        conflict / energy,
    )


def _overlap(one: _Decomposed, other: _Decomposed, cosines: torch.Tensor) -> float:
    """sum p_i q_j cos^2 over its largest possible value, p and q the shares of the energy of the directions.

    The largest is sqrt(sum p^2 sum q^2), by Cauchy and Schwarz: the normalised inner product of the two Gram matrices.
    """
    p, q = one.values.square() / one.energy, other.values.square() / other.energy
    return float(p @ cosines.square() @ q / (p.norm() * q.norm()))


def _angle(cosines: torch.Tensor) -> float:
    """The smallest principal angle in degrees (Bjorck and Golub 1973): the largest singular value is its cosine."""
    return math.degrees(math.acos(min(1.0, float(torch.linalg.matrix_norm(cosines, 2)))))


PANELS = {
    "conflict": "energy lost where they cancel",
    "rows": "overlap of the inputs they read",
    "columns": "overlap of the outputs they write",
}


def heat_map(pairs: Sequence[Pair], path: Path) -> Path:
    """One panel for each figure, a row for each pair of adapters, a column for each block; written as a PNG.

    White is 0; the darkest is each panel's largest figure, which stands in its heading. Equal figures give equal bytes.
    """
    # The object API: no global state, no display, and nothing imported until something is plotted.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(pair.block for pair in pairs))
    rows = list(dict.fromkeys(f"{pair.first} + {pair.second}" for pair in pairs))
    figure = Figure(
        figsize=(3.5 + 0.32 * len(blocks), 2.6 + 3 * (0.5 + 0.3 * len(rows))), dpi=100, layout="constrained"
    )
    FigureCanvasAgg(figure)
    for number, (name, title) in enumerate(PANELS.items()):
        values = [[float("nan")] * len(blocks) for _ in rows]
        for pair in pairs:
            values[rows.index(f"{pair.first} + {pair.second}")][blocks.index(pair.block)] = getattr(pair, name)
        largest = max(getattr(pair, name) for pair in pairs)
        axes = figure.add_subplot(len(PANELS), 1, number + 1)
        axes.imshow(values, cmap="Reds" if name == "conflict" else "Blues", vmin=0, vmax=largest or 1, aspect="auto")
        axes.set_title(f"{title} (darkest: {largest:.1%})", fontsize=10, loc="left")
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        last = number == len(PANELS) - 1
        axes.set_xticks(range(len(blocks)), blocks if last else [""] * len(blocks), rotation=90, fontsize=8)
        axes.tick_params(length=0)
        axes.set_facecolor("#dddddd")  # blocks that the pair does not share
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path
