"""What each mode is worth for short and for long queries: mean nDCG@10 by their number of words.

Takes what `search-r3 eval --details FILE` wrote.

    python benchmarks/words.py details.jsonl
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

BINS = {2: "1-2", 5: "3-5", 10: "6-10"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("details", type=Path)
    rows = [json.loads(line) for line in parser.parse_args().details.read_text(encoding="utf-8").splitlines()]
    binned = defaultdict(list)
    for row in rows:
        count = len(row["text"].split())
        binned[next((name for most, name in BINS.items() if count <= most), "more")].append(row["scores"])
    print("| words | queries | " + " | ".join(rows[0]["scores"]) + " |")
    print("|---" * (2 + len(rows[0]["scores"])) + "|")
    for name in [*BINS.values(), "more"]:
        if scores := binned[name]:
            means = (f"{fmean(score[mode]['nDCG@10'] for score in scores):.3f}" for mode in rows[0]["scores"])
            print(f"| {name} | {len(scores)} | " + " | ".join(means) + " |")


if __name__ == "__main__":
    main()
