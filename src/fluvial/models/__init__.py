"""Hugging Face models: loaded, adapted, frozen and lent, without copies of their code."""
