"""Settings -> the best of them, by few trials one after the other.

Each setting has a grid of values. The best of these, where it is at an end,
leads to values beyond it; in the end those between the best and its neighbours
are tried:

    grid        0.1   0.3   1.0      best 0.1, at the end
    beyond   0.03                    best 0.1
    between    0.05 0.17             best 0.17: taken

While one setting is tried, those before it are at their best, those after it
in the middle of their grids.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from multilstm.evaluation import Evaluation

Settings = dict[str, float]

_MOST_BEYOND = 3  # values that are tried beyond the end of a grid


class Search:
    """Finds the settings of lowest cross-entropy, one after the other.

    Args:
        score: Settings, as keywords -> cross-entropy.
        tell: Called with a line for each settings that are tried.
    """

    def __init__(
        self, score: Callable[..., float], tell: Callable[[str], None]
    ) -> None:
        self._score = score
        self._tell = tell
        self._tried: dict[tuple[tuple[str, float], ...], float] = {}

    def __call__(self, grids: dict[str, Sequence[float]]) -> None:
        """Tries the values of each, the others at the best so far.

        A grid has values above 0 in rising order; one of a single value is
        kept to.
        """
        best = {name: grid[len(grid) // 2] for name, grid in grids.items()}
        for name, grid in grids.items():

            def at(value: float, name: str = name) -> float:
                return self._try(best | {name: value})

            best[name] = _lowest(at, grid)

    def best(self) -> Settings:
        """The best settings of all that were tried."""
        best = min(self._tried, key=lambda key: self._tried[key])
        return dict(best)

    def describe(self, num_words: int) -> dict[str, Any]:
        """What was tried, by predicting so many words of the valid text."""
        tried = [
            {**dict(settings), "cross_entropy": score}
            for settings, score in self._tried.items()
        ]
        return {"text": "valid", "num_words": num_words, "tried": tried}

    def _try(self, settings: Settings) -> float:
        key = tuple(settings.items())
        if key not in self._tried:
            score = self._score(**settings)
            self._tried[key] = score if math.isfinite(score) else math.inf
            shown = f"perplexity {Evaluation(score, 1).perplexity:.2f}"
            self._tell(f"{show_settings(settings)}: {shown}")
        return self._tried[key]


def show_settings(settings: Settings) -> str:
    """One line: "learning rate 0.3, decay 0.001"."""
    return ", ".join(
        f"{name.replace('_', ' ')} {float(f'{value:.3g}'):g}"
        for name, value in settings.items()
    )


def _lowest(score: Callable[[float], float], grid: Sequence[float]) -> float:
    """Where the score is lowest: on the grid, beyond it, and in between."""
    values = list(grid)
    best = min(values, key=score)
    if len(values) == 1:
        return best
    most = len(values) + _MOST_BEYOND
    while best in (values[0], values[-1]) and len(values) < most:
        if best == values[0]:
            values.insert(0, values[0] ** 2 / values[1])
        else:
            values.append(values[-1] ** 2 / values[-2])
        best = min(values, key=score)
    place = values.index(best)
    neighbours = values[max(place - 1, 0) : place + 2]
    return min(
        [best, *(math.sqrt(best * other) for other in neighbours)], key=score
    )
