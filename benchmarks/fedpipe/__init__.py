"""The benchmark of FedPipe: loss and time beside other LoRA methods, its planner, its models."""
