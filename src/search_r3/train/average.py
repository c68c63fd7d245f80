"""Between two checkpoints of one descent: the weighted mean of their weights.

Stage 2 makes reasoning better and direct search a little worse; a point on the line between the models before and after
it can have most of the one without the other. Source: Wortsman et al., 2022 (arXiv 2109.01903).
"""

from __future__ import annotations

from pathlib import Path

import torch

from search_r3.errors import CheckpointError
from search_r3.model.checkpoint import AVERAGED, Manifest, Parent, load, resolve, save


@torch.no_grad()
def average(first: str | Path, second: str | Path, output: Path, weight: float = 0.5) -> Manifest:
    """Write (1 - weight) * first + weight * second, with the default lengths of the first, as a plain checkpoint.

    Raises CheckpointError for models of other shapes, prompts or embedding tokens, a weight outside 0 to 1, and if
    `output` exists.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists already; give a new folder")
    if not 0 <= weight <= 1:
        raise CheckpointError(f"weight must lie between 0 and 1, got {weight}")
    model, tokenizer, manifest = load(resolve(first))
    other, _, other_manifest = load(resolve(second))
    if (manifest.embed_token_id, manifest.prompts) != (other_manifest.embed_token_id, other_manifest.prompts):
        raise CheckpointError(f"{first} and {second} have different prompts or embedding tokens; their mean is neither")
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    for name in mine.keys() | theirs.keys():
        if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape:
            raise CheckpointError(f"{first} and {second} differ in {name}; average models of the same base")
    for name, parameter in mine.items():
        parameter.lerp_(theirs[name], weight)
    return save(
        output,
        model,
        tokenizer,
        manifest.prompts,
        embed_token=manifest.embed_token,
        max_tokens=manifest.max_tokens,
        parent=Parent(source=f"{first}{AVERAGED}{second} (weight {weight:g})", weights_sha256=manifest.weights_sha256),
        training=(*manifest.training, *(run for run in other_manifest.training if run not in manifest.training)),
    )
