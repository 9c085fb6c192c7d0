"""Building a model: the libraries change classes of the whole process while they do it.

transformers switches `PreTrainedModel.tie_weights` and torch's default type, accelerate switches
`Module.register_parameter`, and each restores what it found. Two threads that build models at the
same time could restore each other's switch, and no later model of the process would be right.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_one_at_a_time = threading.RLock()


@contextmanager
def building() -> Iterator[None]:
    """Build a model while no other thread of this process does, and without transformers' reports.

    Our own progress and errors are shown instead of them.
    """
    from transformers.utils import logging

    with _one_at_a_time:
        logging.disable_progress_bar()
        level = logging.get_verbosity()
        logging.set_verbosity_error()

        try:
            yield
        finally:
            logging.set_verbosity(level)
