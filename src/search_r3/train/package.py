"""From a merged checkpoint back to a small adapter: the low-rank part of what training changed, and the token's row.

Stages merge their adapters into plain checkpoints. The differences of all stages together are one matrix a layer; its
largest singular directions are one adapter, as small as the rank asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from search_r3.errors import CheckpointError
from search_r3.files import new_folder, write_text
from search_r3.model.checkpoint import MANIFEST, Parent, describe, lasting_name, load, resolve

TOKEN_ROW = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"  # the row itself


def extract_adapter(checkpoint: str | Path, base: str | Path, output: Path, rank: int = 24) -> dict[str, float]:
    """Write a LoRA adapter in bfloat16 (PEFT's format) that turns `base` into nearly `checkpoint`.

    Its manifest holds the prompts, the lengths, and the runs that trained it after the base.
    Returns the share of the change that is kept (squared norm) and the adapter's size in MB. Raises CheckpointError for
    models of other shapes, for changes that no such adapter can hold, and if `output` exists.
    """
    from peft import LoraConfig

    if output.exists():
        raise CheckpointError(f"{output}: exists already; give a new folder")
    trained, tokenizer, manifest = load(resolve(checkpoint))
    original, _, base_manifest = load(resolve(base))
    if manifest.embed_token_id != base_manifest.embed_token_id:
        raise CheckpointError(f"{checkpoint} and {base} have different embedding tokens; give the base it came from")
    before, names = dict(original.named_parameters()), []
    tensors: dict[str, torch.Tensor] = {}
    kept = total = 0.0
    linear = {f"{name}.weight" for name, part in trained.named_modules() if isinstance(part, torch.nn.Linear)}
    embedding = trained.get_input_embeddings().weight
    for name, parameter in trained.named_parameters():
        if name not in before or before[name].shape != parameter.shape:
            raise CheckpointError(f"{checkpoint}: {name} has no equal in {base}; give the base it came from")
        change = (parameter - before[name]).detach()
        if parameter is embedding:
            row = manifest.embed_token_id
            tensors[TOKEN_ROW] = parameter[row : row + 1]
            change[row] = 0
        if not change.any():
            continue
        if name not in linear or name.startswith("lm_head"):
            raise CheckpointError(f"{checkpoint}: {name} was trained, too; ship the whole checkpoint instead")
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        root = values[:rank].sqrt()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        room = (0, 0, 0, max(0, rank - len(values)))  # PEFT expects the same rank everywhere
        tensors[f"{stem}.lora_A.weight"] = torch.nn.functional.pad(root[:, None] * right[:rank], room)
        tensors[f"{stem}.lora_B.weight"] = torch.nn.functional.pad(left[:, :rank] * root, room[2:])
        kept += float((values[:rank] ** 2).sum())
        total += float((values**2).sum())
        names.append(name.removesuffix(".weight").split(".")[-1])
    if not names:
        raise CheckpointError(f"{checkpoint}: no layer differs from {base}; there is nothing to package")
    named = lasting_name(base)
    config: Any = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(set(names)),
        trainable_token_indices={"embed_tokens": [manifest.embed_token_id]},
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=named,
    )
    stored = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    with new_folder(output) as folder:
        save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_model.safetensors").chmod(0o644)
        config.save_pretrained(str(folder))
        own = describe(
            folder,
            trained,
            tokenizer,
            manifest.prompts,
            manifest.embed_token,
            manifest.max_tokens,
            Parent(source=named, weights_sha256=base_manifest.weights_sha256),
            tuple(stage for stage in manifest.training if stage not in base_manifest.training),
        )
        write_text(folder / MANIFEST, own.model_dump_json(indent=2) + "\n")
    size = (output / "adapter_model.safetensors").stat().st_size / 1e6
    return {"kept": kept / total if total else 1.0, "megabytes": size}
