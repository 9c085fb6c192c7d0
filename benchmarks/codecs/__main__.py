"""Entry of `python -m benchmarks.codecs NAME`, where NAME is one of `BENCHMARKS`."""

import sys

from benchmarks.codecs import adapters, bytes_to_target, rate_distortion, snr, speed

BENCHMARKS = {
    "adapters": adapters.main,
    "bytes_to_target": bytes_to_target.main,
    "rate_distortion": rate_distortion.main,
    "snr": snr.main,
    "speed": speed.main,
}


def main() -> None:
    """Run the benchmark that the first argument names with the arguments after it."""
    names = " | ".join(BENCHMARKS)
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        sys.exit(f"usage: python -m benchmarks.codecs {names} [--help]")

    BENCHMARKS[sys.argv.pop(1)]()


if __name__ == "__main__":
    main()
