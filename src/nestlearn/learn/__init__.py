"""Models that go on learning: sessions, and their memories on disk."""

from .conversation import ChatTurn
from .session import Difference, Learned, Session
from .store import describe, load_memory, save_memory

__all__ = [
    "ChatTurn",
    "Difference",
    "Learned",
    "Session",
    "describe",
    "load_memory",
    "save_memory",
]
