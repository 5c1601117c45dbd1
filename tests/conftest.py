"""One thread a test process: `make test` runs a process a core, and threads that wait for each other
on a busy machine make small tensors ten times slower."""

import os

# before torch is imported; subprocesses inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
