"""Live stream: the turns of conversations between sites and the process of a run, over gRPC."""
