"""One rank of a training run, with an accident on demand: ACCIDENT STEP, then the words of the command line.

ACCIDENT: none; sigterm (rank 0 gets the signal before step STEP); kill (every rank dies there without a word).
Exit codes are those of clipdist/train.py; a kill is 9.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from clipdist.checkpoint.saver import WRITER
from clipdist.data.loader import Loader
from clipdist.errors import run_main
from clipdist.train import main

if __name__ == "__main__":
    accident, step, *words = sys.argv[1:]
    load = Loader.next

    def load_with_accident(loader, interrupted=None):
        batch = load(loader, interrupted)
        if batch.position == int(step):
            if accident == "kill":
                while any(thread.name == WRITER for thread in threading.enumerate()):
                    time.sleep(0.01)  # which checkpoint is the newest must not hang on the disk's speed
                os._exit(9)
            if accident == "sigterm" and loader.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return batch

    Loader.next = load_with_accident
    run_main(lambda: main(words))
