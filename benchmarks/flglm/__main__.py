"""Entry of `python -m benchmarks.flglm`."""

from benchmarks.flglm.main import main

if __name__ == "__main__":
    main()
