"""Two models on the same queries: mean difference of nDCG@10 a query, and the p of the paired randomisation test.

Takes what `search-r3 eval --details FILE` wrote for each; modes that only one of them has are left out.

    python benchmarks/compare.py before.jsonl after.jsonl
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

from search_r3.evaluate.metrics import paired_p_value


def read(path: Path) -> dict[tuple[str, str], dict]:
    """Scores of every query."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(row["collection"], row["query"]): row["scores"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    before, after = read(args.before), read(args.after)
    if before.keys() != after.keys():
        sys.exit(f"{args.before} and {args.after} are of different queries; evaluate both on the same sets")
    first = next(iter(before))
    print("| mode | a query | p |\n|---|---|---|")
    for mode in [mode for mode in after[first] if mode in before[first]]:
        old, new = ([found[name][mode]["nDCG@10"] for name in before] for found in (before, after))
        print(f"| {mode} | {fmean(new) - fmean(old):+.4f} | {paired_p_value(new, old):.4f} |")


if __name__ == "__main__":
    main()
