"""Retrieval quality, measured with a standard tool, beside baselines and controls."""
