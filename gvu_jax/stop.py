"""Stopping in time: what SIGTERM (a preemption notice) and SIGINT (Ctrl-C) do to a run.

Nothing that is finished may be lost, and nothing may outlast the grace period of a preempted machine:

    nothing is unsaved     the process ends at once, even in the middle of a compilation, pretraining or evaluation
    a step is in flight    the loop drops it, saves the state before it and ends
    the second signal      the process ends at once

The exit status is always STOPPED: the same command goes on from there. On several hosts the loop's processes decide
together, before each step and each update, so that all of them save the same step.
"""
import os
import signal
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

STOPPED = 75          # EX_TEMPFAIL of sysexits.h: not an error, try again


class Stop:
    """Listens from `with` on. `unsaved`: whether there is something to lose; the loop says so."""

    def __init__(self):
        self.unsaved, self.asked = False, False

    def __enter__(self):
        # A thread reads the pipe that the C handler writes to: Python's own handlers would wait for the compiler.
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer)
            self._handlers = {number: signal.signal(number, lambda *_: None)
                              for number in (signal.SIGTERM, signal.SIGINT)}
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *exception):
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)                                       # which ends the thread

    def _listen(self):
        while number := os.read(self._reader, 1):
            if self.asked or not self.unsaved:
                print(f"stopped by {signal.Signals(number[0]).name}: give the same command again to go on",
                      file=sys.stderr, flush=True)
                os._exit(STOPPED)
            self.asked = True
        os.close(self._reader)

    def requested(self):
        """Whether the loop is to save and end; the same answer in every process."""
        if jax.process_count() == 1:
            return self.asked
        return bool(multihost_utils.process_allgather(np.array(self.asked)).any())
