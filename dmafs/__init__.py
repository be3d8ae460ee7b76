"""dmafs keeps the whole recent history of a disk and shows any moment of it as a plain image file."""

import os

# numpy would begin threads for linear algebra, which nothing here does, and they would keep the rights that the daemon
# drops in its only thread.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
