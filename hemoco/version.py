"""The version of hemoco."""

__version__ = "0.1.0"
