"""Search and embeddings over HTTP."""
