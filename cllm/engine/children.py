"""What the processes that an engine starts have in common."""

import multiprocessing
import os
import signal
import threading


def live_with_parent() -> None:
    """To be called first of all in a child: it ends when its parent does, however that ends, and not by Ctrl-C, which
    reaches the parent as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """On a thread of its own: the main thread may wait in a call that never ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
