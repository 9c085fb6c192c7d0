"""The benchmark of engines: time, start-up, memory and bytes of a round apart from training."""
