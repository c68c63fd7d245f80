"""Which signal tells best over which queries to reason: each alone, and a linear mix fitted on other collections; and
what comes of `search --gate`.

Takes what `search-r3 eval --modes direct,reason --details FILE` wrote; a query's rows in several files are joined.

    python benchmarks/gate.py --fit dev.jsonl --test test.jsonl --json
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from common import finish
from search_r3.evaluate.gate import curve
from search_r3.evaluate.metrics import paired_p_value

SIGNALS = ("margin", "words", "overlap")


def read(paths: list[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signals (Q, 3), direct and reasoned nDCG@10 (Q,) of every query."""
    rows: dict[tuple[str, str], dict] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            row = rows.setdefault((found["collection"], found["query"]), {})
            row |= found | {"scores": row.get("scores", {}) | found["scores"]}
    told = np.array([[row["signals"][name] for name in SIGNALS] for row in rows.values()])
    scores = [[row["scores"][mode]["nDCG@10"] for row in rows.values()] for mode in ("direct", "reason")]
    return told, np.array(scores[0]), np.array(scores[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--fit", type=Path, nargs="+", required=True, help="details of the collections to fit on")
    parser.add_argument("--test", type=Path, nargs="+", required=True, help="details of the collections to test on")
    parser.add_argument("--strength", type=float, default=0.1, help="of the ridge, a query (0.1)")
    parser.add_argument(
        "--gate", type=float, default=0.02, help="the margin below which one reasons, for a test (0.02)"
    )
    args = parser.parse_args()
    told, direct, reason = read(args.fit)
    fitted, gain = len(told), reason - direct
    center, spread = told.mean(axis=0), told.std(axis=0)
    scaled = (told - center) / spread
    weights = np.linalg.solve(  # of a ridge regression
        scaled.T @ scaled + args.strength * fitted * np.eye(len(SIGNALS)), scaled.T @ (gain - gain.mean())
    )
    told, direct, reason = read(args.test)
    tried = {name: told[:, place] for place, name in enumerate(SIGNALS)}
    tried["mix"] = -((told - center) / spread) @ weights  # the largest expected gain first
    nothing = np.zeros(len(direct))
    curves = {name: curve(values, direct, reason, nothing, nothing) for name, values in tried.items()}
    curves["random"] = [{"score": point["random"], "share": point["share"]} for point in curves["margin"]]
    print("share   " + "".join(f"{name:>9}" for name in curves), file=sys.stderr)
    for row in zip(*curves.values(), strict=True):
        print(f"{row[0]['share']:5.2f}   " + "".join(f"{point['score']:9.4f}" for point in row), file=sys.stderr)
    gated = np.where(told[:, 0] < args.gate, reason, direct)
    finish(
        {
            "gate": {
                "share": float((told[:, 0] < args.gate).mean()),
                "score": float(gated.mean()),
                "over direct": float((gated - direct).mean()),
                "p": paired_p_value(gated, direct),
                "over all reasoned": float((gated - reason).mean()),
                "its p": paired_p_value(gated, reason),
            },
            "queries": {"fit": fitted, "test": len(direct)},
            "weights": dict(zip(SIGNALS, weights.tolist(), strict=True)),
            "mean_over_shares": {n: float(np.mean([p["score"] for p in points])) for n, points in curves.items()},
        },
        args.json,
    )


if __name__ == "__main__":
    main()
