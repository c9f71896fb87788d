"""The figures of `overlap` as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.files.atomic import atomic_path
from sfumato.merging.overlap import Pair

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
