"""FedPipe: a plan for every site, made automatically, and unequal adapters that add up exactly."""
