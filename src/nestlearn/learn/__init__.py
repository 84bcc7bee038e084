"""Models that go on learning: sessions, and their memories on disk."""

from .consolidation import StudyConfig
from .conversation import ChatTurn
from .session import Difference, Learned, Session
from .store import delete_memory, describe, load_memory, save_memory
from .study import Studied

__all__ = [
    "ChatTurn",
    "Difference",
    "Learned",
    "Session",
    "Studied",
    "StudyConfig",
    "delete_memory",
    "describe",
    "load_memory",
    "save_memory",
]
