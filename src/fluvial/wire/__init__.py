"""Tensors, payloads and frames: the one checked format between server and sites."""
