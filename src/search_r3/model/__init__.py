"""From text to vectors: prompts, checkpoints, the embedding itself, the engine and the reasoning decoder."""
