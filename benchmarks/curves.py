"""Draws the curves of a comparison, one colour a backend.

python benchmarks/curves.py comparison.json curves.svg
"""

import sys
from pathlib import Path

import matplotlib as mpl

from multilstm.files import read_json
from multilstm.run_folder import draw_curves
from multilstm.selection import COMPARISON_SCHEMA


def main() -> None:
    """Reads one file and writes the other, the same for the same figures."""
    source, target = (Path(argument) for argument in sys.argv[1:3])
    comparison = read_json(source, schema=COMPARISON_SCHEMA)
    histories = {
        backend: record["history"]
        for backend, record in comparison["results"].items()
    }
    mpl.rcParams["svg.hashsalt"] = "multilstm"
    draw_curves(histories).savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
