"""Whole models."""

from .hope import HopeConfig, HopeLM, HopeState

__all__ = ["HopeConfig", "HopeLM", "HopeState"]
