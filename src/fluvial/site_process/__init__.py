"""A site as a process of its own."""
