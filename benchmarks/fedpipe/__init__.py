"""Benchmarks of FedPipe: choices of weights at equal bytes."""
