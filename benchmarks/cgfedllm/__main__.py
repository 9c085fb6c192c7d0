"""Entry of `python -m benchmarks.cgfedllm`."""

from benchmarks.cgfedllm.gate_and_loss import main

if __name__ == "__main__":
    main()
