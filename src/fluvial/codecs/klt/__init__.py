"""The learned Karhunen-Loeve transform, its entropy coder and its variants."""
