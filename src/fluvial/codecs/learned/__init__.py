"""Codecs whose networks or tables are fitted to updates."""
