"""Benchmarks of the package and of its codecs, one folder each.

    python -m benchmarks.FOLDER [--quick] [--out FILE]

`benchmarks.codecs` holds three and takes the name of one first. Results that the documents quote
are in `results`.
"""
