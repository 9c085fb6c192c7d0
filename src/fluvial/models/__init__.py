"""Hugging Face models, adapted, frozen and read from outside."""
