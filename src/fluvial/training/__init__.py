"""The one training loop, the one loss, and held-out measures."""
