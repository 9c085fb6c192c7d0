"""The benchmarks of codecs: bytes until a loss is reached, error at a rate, and speed."""
