"""Codecs behind a random rotation, after which any update looks Gaussian."""
