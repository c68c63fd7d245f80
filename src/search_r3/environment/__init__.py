"""A retrieval environment whose document vectors follow a moving model. Usable without any trainer."""

from search_r3.environment.config import EnvironmentConfig
from search_r3.environment.encoder import Encoder, ShardedEncoder
from search_r3.environment.environment import RetrievalEnvironment
from search_r3.environment.outcome import Outcome, Relevant, dcg

__all__ = ["Encoder", "EnvironmentConfig", "Outcome", "Relevant", "RetrievalEnvironment", "ShardedEncoder", "dcg"]
