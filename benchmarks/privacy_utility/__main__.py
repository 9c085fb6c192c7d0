"""Entry of `python -m benchmarks.privacy_utility`."""

from benchmarks.privacy_utility.curve import main

if __name__ == "__main__":
    main()
