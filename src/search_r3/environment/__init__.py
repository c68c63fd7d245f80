"""A retrieval environment whose document vectors follow a moving model. Usable without any trainer."""

from search_r3.environment.environment import EnvironmentConfig, RetrievalEnvironment
from search_r3.environment.outcome import Outcome, Relevant, dcg

__all__ = ["EnvironmentConfig", "Outcome", "Relevant", "RetrievalEnvironment", "dcg"]
