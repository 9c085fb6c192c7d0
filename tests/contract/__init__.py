"""Tests of what every method, codec and table of settings must keep."""
