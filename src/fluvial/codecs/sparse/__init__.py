"""Codecs that send some of the values: the largest ones, or those at random positions."""
