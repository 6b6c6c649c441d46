"""How long tests wait, and with how many threads they compute: nothing of it may depend on a fast machine."""

import os

# Seconds for what takes a moment on a machine that is free: another process that imports torch, a reply, an end. Only
# what hangs waits as long, so it costs nothing to be generous. Below pytest's own timeout, whose message says less.
PATIENCE = 600.0

THREADS = int(os.environ.get("VIDEOR1_TEST_THREADS", "1"))  # torch's: two on a busy machine of two wait for each other
