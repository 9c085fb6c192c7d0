"""Tests of the secure channel: its keys, its handshake and its frames."""
