"""Losses on the forward process, advantage-weighted matching and NFT, and its noising."""

from .api import MatchingLoss, add_noise, matching_loss

__all__ = ["MatchingLoss", "add_noise", "matching_loss"]
