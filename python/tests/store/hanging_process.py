"""A Python process whose store hangs in the kernel, for ``test_store_exit.py``.

Stores a chunk, waits for a line, starts what will hang, closes the store and ends. What it gets to,
it says on standard output, with the seconds since it was told to go on.
"""

import atexit
import os
import socket
import sys
import time

from store_harness import Geometry, HostMemory, config, key, namespace, parent

from kvrail._core import Store, WaitTimeoutError

CLOSE_LIMIT_SECONDS = 2.0
# For the hanging thread to be in the kernel.
SETTLE_SECONDS = 0.5

path, operation = sys.argv[1:]
limits = {"wait_limit_seconds": 30.0, "lookup_limit_seconds": 30.0}
store = Store(config(path, extra_config=limits), namespace())
kv_cache = HostMemory(Geometry(), seed=1).attach(store)
assert kv_cache.store([(key(1), parent(1), [0, 1, 2, 3])]).wait(60.0).stored == 1
listening = socket.create_server(("127.0.0.1", 0))
print("ready", listening.getsockname()[1], flush=True)
# Left to the end of the process: what Python closes before that is not in question.
listening.detach()
sys.stdin.readline()
start = time.monotonic()


def say(what: str) -> None:
    """Tells the test, past Python's buffers: the interpreter may be ending."""
    os.write(1, f"{what} {time.monotonic() - start:.3f}\n".encode())


# Held until the end, as a serving engine holds its own.
tickets = {
    "load": lambda: kv_cache.load([(key(1), parent(1), 0, [4, 5, 6, 7])]),
    "lookup": lambda: store.lookup([key(1)], group=0, ranks=[0]),
    "store": lambda: kv_cache.store([(key(2), parent(2), [0, 1, 2, 3])]),
}
ticket = tickets[operation]()
time.sleep(SETTLE_SECONDS)
say("close")
try:
    store.close(CLOSE_LIMIT_SECONDS)
except WaitTimeoutError:
    say("given-up")
say("closed")
atexit.register(say, "atexit")
