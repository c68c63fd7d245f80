"""Our decoder against transformers.generate followed by a second forward pass: greedy, same weights and threads.

The peer is what one writes without this library: left-padded `generate`, then one more pass over prompt, reasoning and
the embedding token for the vector.

    python benchmarks/reason.py --json
"""

import numpy as np
import torch

from common import arguments, demo_queries, finish, paired
from search_r3 import SearchR3
from search_r3.model.embedding import embed


def main() -> None:
    args = arguments(__doc__, queries=(32, "queries"), new_tokens=(48, "tokens to think"), repeats=(3, "counted runs"))
    model = SearchR3.from_pretrained("base")
    engine, queries = model.engine, demo_queries(args.queries)
    prompts = [[*engine.prefix_ids("reason"), *tail] for tail in engine.tails(queries, "reason", 256)]
    eos = engine.tokenizer.eos_token_id

    def pad_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, rows))
        ids = torch.tensor([[eos] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    @torch.inference_mode()
    def theirs() -> tuple[list[list[int]], np.ndarray]:
        ids, mask = pad_left(prompts)
        output = engine.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=args.new_tokens, do_sample=False,
            eos_token_id=[eos, engine.embed_token_id], pad_token_id=eos,
        )[:, ids.shape[1] :].tolist()  # fmt: skip
        thoughts = [row[: row.index(eos)] if eos in row else row for row in output]
        ids, mask = pad_left([[*p, *t, engine.embed_token_id] for p, t in zip(prompts, thoughts, strict=True)])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = engine.backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return thoughts, embed(states, ids, engine.embed_token_id).numpy()

    def ours() -> tuple[list[list[int]], np.ndarray]:
        results = model.reason(queries, max_new_tokens=args.new_tokens, batch_rows=args.queries)
        thoughts = [[token for token in r.token_ids if token != eos] for r in results]
        return thoughts, np.stack([r.vector for r in results])

    (our_text, our_vectors), (their_text, their_vectors) = ours(), theirs()
    times = paired(ours, theirs, args.repeats)
    finish(
        {
            "reason_x": times["ratio"],
            "same_text": our_text == their_text,
            "same_texts": sum(a == b for a, b in zip(our_text, their_text, strict=True)),
            "max_abs_diff": float(np.abs(our_vectors - their_vectors).max()),
            "tokens_per_s": sum(map(len, our_text)) / times["ours_s"],
            "ours_s": times["ours_s"],
            "theirs_s": times["theirs_s"],
            "queries": len(queries),
            "threads": args.threads,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
