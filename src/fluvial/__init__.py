"""Fluvial: fine-tune one language model over many sites whose data must stay where it is."""

__version__ = "0.1.0"
