"""nestlearn: models that keep learning (Nested Learning and Hope in PyTorch)."""

__version__ = "0.1.0"
