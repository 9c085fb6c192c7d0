"""Tests of documents, examples, benchmarks and the lock file: their statements and their code."""
