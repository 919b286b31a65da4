"""Guidance that keeps the length of every token."""

from .api import rescaled_guidance

__all__ = ["rescaled_guidance"]
