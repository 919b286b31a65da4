"""Rewards on another machine: `flowkern serve-reward` there, `kind: remote` here.

`protocol` has what both sides say, `body` images as bytes, `server` and `worker` that machine's
side, `client` this one's. Nothing that comes over the network is ever unpickled.
"""
