"""Traces of rounds by torch.profiler, for the work of this process."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = "profile"
"""Folder of the traces in a run's folder."""


@contextmanager
def profiled(folder: Path, round: int, rounds: Collection[int]) -> Iterator[None]:
    """Write a trace of what happens meanwhile, on all threads, if `round` is one of `rounds`.

    The file is `profile/round-N.pt.trace.json.gz`, in the form of Chrome's trace viewer.
    """
    if round not in rounds:
        yield
        return

    import torch
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    # Sites work in threads of their own.
    threads = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=threads) as profiler:
        yield

    (folder / FOLDER).mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / FOLDER / f"round-{round:06d}.pt.trace.json.gz"))
