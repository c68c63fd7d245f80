"""What a run will take, before it starts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from search_r3.model.checkpoint import config_folder
from search_r3.train.supervised import Prepared

CPU_FLOPS = {"float32": 80e9, "bfloat16": 170e9}  # two cores (AVX-512, AMX): what whole training runs reached
GPU_FLOPS = 200e12  # bfloat16, one H100, at a usual share of its peak


def estimate(prepared: Prepared) -> dict[str, Any]:
    """Examples and tokens of each source, parameters, memory and time; counted on a sample of the planned steps."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    recipe = prepared.recipe
    folder = config_folder(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    parameters = model.num_parameters()
    linear = sum(
        part.in_features + part.out_features
        for part in model.get_decoder().modules()
        if isinstance(part, torch.nn.Linear)
    )
    trained = parameters if recipe.lora is None else recipe.lora.r * linear
    batch = recipe.batch
    sample = prepared.order[:: max(1, len(prepared.order) // 1000)][:1000]

    def tokens(texts: list[str], limit: int) -> float:
        return sum(min(len(ids), limit) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) / len(texts)

    query = tokens([example.query for example in sample], batch.query_tokens)
    document = tokens([example.positive.text for example in sample], batch.document_tokens)
    negatives = sum(min(len(example.negatives), batch.negatives) for example in sample) / len(sample)
    thoughts = [example.thought for example in sample if example.thought]
    thought = (query + tokens(thoughts, batch.thought_tokens)) * len(thoughts) / len(sample) if thoughts else 0
    frame = 10  # template and reply around each text
    step = batch.queries * (query + thought + document * (1 + negatives) + frame * (2 + negatives))
    backbone = parameters - model.get_input_embeddings().weight.numel()
    # A backward pass like one forward pass, like two where all weights are trained; one more for the gradient cache.
    passes = (2 if recipe.lora else 3) + (step > batch.chunk_tokens)
    work = 2 * backbone * step * recipe.steps * passes
    copies = 0 if recipe.lora or not recipe.loss.kl else 1
    memory = 4 * parameters * (1 + copies) + 12 * trained + 2000 * model.config.hidden_size * batch.chunk_tokens
    gpu = torch.cuda.is_available()
    examples: Counter[str] = Counter()
    for source, found in zip(recipe.sources, prepared.sources, strict=True):
        kind = ", with thoughts" if source.only_thoughts else ", titles" if source.titles else ""
        examples[source.path + kind] += len(found)
    return {
        "recipe": recipe.model_dump(),
        "examples": dict(examples),
        "left_out": dict(prepared.dropped.counts),
        "parameters": parameters,
        "trained_parameters": trained,
        "tokens_per_step": round(step),
        "tokens": round(step * recipe.steps),
        "memory_gb": round(memory / 1e9, 1),
        "hours": round(work / (GPU_FLOPS if gpu else CPU_FLOPS[recipe.precision]) / 3600, 2),
        "assumed_device": "one GPU (200 TFLOP/s)" if gpu else "two CPU cores (AVX-512)",
    }
