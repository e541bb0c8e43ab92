"""Training of Kronecker recurrent models and of their baselines: one loop, one file a task, one YAML a recipe."""

import os

# Threads that wait for another sleep. By default they keep their cores busy, and where another process wants one of
# those, each product waits for a time slice: a step then took 20 times as long as on one thread. It is read when torch
# is imported, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
