"""A reward of your own: reinforce reasonings that rank well and do not repeat the query.

python examples/reward.py            # a few steps on the bundled pages; teaches next to nothing
"""

import os
import sys
import tempfile
from pathlib import Path

from search_r3.environment import Outcome
from search_r3.records import Episode

HERE = Path(__file__).parent


def fresh_words(episode: Episode, outcome: Outcome) -> float | None:
    """Reciprocal rank, times the share of the reasoning's words that the query does not have; None: not scorable."""
    if not outcome.relevant:
        return None
    words = episode.reasoned.text.lower().split()
    asked = set(episode.query.lower().split())
    new = sum(word not in asked for word in words) / len(words) if words else 0.0
    return new / outcome.relevant[0].rank


if __name__ == "__main__":
    from search_r3.train.reinforce import prepare, train
    from search_r3.train.rl_config import read_rl_recipe

    sys.path.insert(0, str(HERE))  # where `reward:fresh_words` is found
    recipe = read_rl_recipe(
        HERE.parent / "recipes" / "smoke-rl-cpu.yaml",
        [f"model={os.environ.get('MODEL', 'default')}", "reward.rank=reward:fresh_words", "steps=2"],
    )
    data = HERE.parent / "src" / "search_r3" / "data"
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(recipe, data)
        train(prepared, Path(folder) / "run", progress=False)
        print((Path(folder) / "run" / "rollouts.jsonl").read_text().splitlines()[0])
