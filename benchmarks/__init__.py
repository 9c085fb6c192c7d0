"""What this package costs and what its codecs carry, measured: `python -m benchmarks.NAME [--quick]
[--out FILE]`."""
