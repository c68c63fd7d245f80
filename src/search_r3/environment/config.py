"""How an environment keeps its index fresh."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EnvironmentConfig(BaseModel):
    """How the environment keeps its index fresh."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["frozen", "full", "in_batch", "random", "local", "read_repair", "read_repair+drift"] = (
        "read_repair+drift"
    )
    """What a step encodes again; see `freshness.POLICIES`."""
    budget: float = Field(default=0.05, gt=0)
    """Tokens that a step may encode again: a share of the corpus up to 1, a number of tokens above."""
    sample: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the budget for the uniform sample that shows the drift."""
    depth: int = Field(default=100, ge=1)
    """Documents that the index proposes for a query."""
    k: int = Field(default=10, ge=1)
    """Documents in an outcome's ranking."""
    index: Literal["exact", "graph"] = "exact"
    """exact scores every row; graph proposes in less than linear time and estimates ranks beyond its proposals."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored vectors."""
    drift_rank: int = Field(default=64, ge=1)
    """Rank of the drift map."""
    calibrate: bool = True
    """Shift the cosines of stale rows by what the sample says; only for policies that sample."""
    audit_every: int = Field(default=0, ge=0)
    """Steps between audits; 0: only when asked."""
    error_bound: float | None = Field(default=None, gt=0)
    """Largest reward error to tolerate: audits raise and lower the budget to hold it. None: the budget is fixed."""
    seed: int = Field(default=0, ge=0)
    """Of the samples."""

    @model_validator(mode="after")
    def _possible(self) -> EnvironmentConfig:
        if self.error_bound is not None and not self.audit_every:
            raise ValueError("error_bound is held by audits; set audit_every as well")
        return self
