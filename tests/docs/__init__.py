"""Tests of documents, examples, benchmarks and the lock file: what they state, and the code in them."""
