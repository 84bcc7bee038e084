"""The one place of the version: the package and what builds it read it here."""

__version__ = "0.1.0"
