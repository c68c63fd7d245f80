"""Bulk encoding by many workers on a Ray cluster, for corpora that one machine would take days for.

Reading, splitting and storing stay where the index is; workers get tokens and give vectors. A worker that dies is
started again and its part is done once more, so nothing is lost and nothing is stored twice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from search_r3.errors import CheckpointError, SearchR3Error
from search_r3.extras import need

PART = 32  # texts that a worker encodes at once


class RayEncoder:
    """Encodes with one model a worker. A context manager: the workers end with it.

    checkpoint: as for `SearchR3.from_pretrained`, on a path that every worker can read. workers: how many; default: one
    a GPU of the cluster, or one a CPU core where it has none. options: of `SearchR3.from_pretrained`. Raises
    MissingExtraError where Ray is missing, CheckpointError when a worker cannot load the model.
    """

    def __init__(self, checkpoint: str, *, workers: int | None = None, **options: Any):
        need("ray", "distributed encoding")
        import ray

        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            ray.init(log_to_driver=False, include_dashboard=False)
        cluster = ray.cluster_resources()
        gpus = int(cluster.get("GPU", 0))
        there = gpus or max(1, int(cluster.get("CPU", 1)))
        count = workers or there
        if count > there and self._mine and "RAY_ADDRESS" not in os.environ:  # unlike a machine, a cluster may grow
            ray.shutdown()
            what = "GPUs" if gpus else "cores"
            raise CheckpointError(f"{count} workers, but {there} {what}; take no more, or join a cluster (RAY_ADDRESS)")
        kind = ray.remote(num_gpus=1 if gpus else 0, num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Worker)
        self.workers = [kind.remote(checkpoint, None if gpus else 1, options) for _ in range(count)]
        try:
            found = set(ray.get([worker.fingerprint.remote() for worker in self.workers]))
        except ray.exceptions.RayError as error:
            self.close()
            raise CheckpointError(
                f"a worker cannot load {checkpoint}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
            ) from error
        if len(found) > 1:
            self.close()
            raise CheckpointError(f"{checkpoint} is not the same model on all machines of the cluster; copy it to each")
        self.fingerprint: str = found.pop()

    def __call__(self, tails: Sequence[Sequence[int]]) -> np.ndarray:
        """(N, D) float32 vectors of turns of the embed act, in their order."""
        order = sorted(range(len(tails)), key=lambda row: -len(tails[row]))  # like lengths together, the longest first
        parts = [order[start : start + PART] for start in range(0, len(order), PART)]
        pool = self._ray.util.ActorPool(self.workers)
        answers = pool.map(lambda worker, rows: worker.encode.remote([list(tails[row]) for row in rows]), parts)
        vectors: np.ndarray | None = None
        for rows, part in zip(parts, answers, strict=True):
            if vectors is None:
                vectors = np.empty((len(tails), part.shape[1]), np.float32)
            vectors[rows] = part
        if vectors is None:
            raise ValueError("no texts")
        return vectors

    def __enter__(self) -> RayEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and Ray itself if this object started it."""
        for worker in self.workers:
            self._ray.kill(worker)
        if self._mine:
            self._ray.shutdown()


class _Worker:
    """Lives in a process of its own."""

    def __init__(self, checkpoint: str, threads: int | None, options: dict[str, Any]):
        import torch

        from search_r3.model.search_r3 import SearchR3

        if threads:
            torch.set_num_threads(threads)
        try:
            self.model = SearchR3.from_pretrained(checkpoint, **options)
        except SearchR3Error as error:
            raise RuntimeError(str(error)) from None

    def fingerprint(self) -> str:
        return self.model.fingerprint

    def encode(self, tails: list[list[int]]) -> np.ndarray:
        return self.model.engine.encode(tails, "embed")
