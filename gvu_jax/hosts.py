"""The processes of a run find each other, or one line says who is missing.

jax.distributed waits for all of them in silence, and a process whose waiting ends in vain is aborted with a trace of
C++. So they meet before it, at the same address: process 0 listens; the others say who they are and wait for its word.
"""
import contextlib
import os
import socket
import sys
import threading
import time

HELLO = "gvu_jax"                    # begins what a process says: "gvu_jax COUNT INDEX"
GO = "go"                            # and what process 0 answers when all are there; else a reason


def meet(address, count, index, timeout):
    """Returns the seconds that are left when all `count` processes of a run have come to `address` (HOST:PORT, process
    0's), of which this one is number `index`. ValueError where the address is none, and, naming them, where processes
    have not come after `timeout` seconds."""
    ends, (host, _, port) = time.monotonic() + timeout, address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2 ** 16:
        raise ValueError(f"--hosts: {address} names no port: it is of the form HOST:PORT")
    if count > 1:
        (gather if index == 0 else come)(host.strip("[]"), int(port), count, index, ends)
    return ends - time.monotonic()


@contextlib.contextmanager
def watch(timeout):
    """Ends the process with one line where what is inside takes longer: machines that know each other tell nobody who
    is missing."""
    def give_up():
        print(f"error: the other processes of this run did not come within {timeout} s (--hosts=auto): start the same "
              f"command on all of its machines, or give them longer (--hosts_timeout=SECONDS)", file=sys.stderr,
              flush=True)
        os._exit(1)                                        # nothing else ends the waiting inside of jax

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def gather(host, port, count, index, ends):
    """Process 0: waits until all others have come. ValueError names those that have not by `ends`."""
    here = {}                                              # index -> the connection that waits for our word
    try:
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True) if (
            socket.has_dualstack_ipv6()) else socket.create_server(("", port))
    except OSError as error:
        raise ValueError(f"--hosts: process 0 cannot listen at port {port}: {error.strerror or error}") from error
    with listener:
        while missing := [i for i in range(1, count) if i not in here or gone(here[i])]:
            try:
                listener.settimeout(left(ends))
                other, _ = listener.accept()
                other.settimeout(min(5, left(ends)))
                said = other.recv(64).decode(errors="replace").split()
            except TimeoutError:
                if time.monotonic() < ends:
                    continue                               # somebody else's, who says nothing
                why = (f"{named(missing)} of {count} did not come to {host}:{port} in time: start all of them again, "
                       f"or give them longer (--hosts_timeout=SECONDS)")
                tell(here, why)
                raise ValueError(f"--hosts: {why}") from None
            except OSError:
                continue                                   # gone again
            if said[:1] != [HELLO] or len(said) != 3 or not all(map(str.isdigit, said[1:])):
                other.close()
                continue
            theirs, who = map(int, said[1:])
            wrong = (f"process {who} was started as one of {theirs}, and process 0 as one of {count}" if theirs != count
                     else f"two processes say that they are number {who} of {count}"
                     if who in here and not gone(here[who]) else "")
            if wrong:
                tell(here | {-1: other}, wrong)
                raise ValueError(f"--hosts: {wrong}")
            here[who] = other
    tell(here, GO)


def come(host, port, count, index, ends):
    """All but process 0: say who they are and wait for its word. ValueError where it does not come by `ends`."""
    why = "it never answered"
    while time.monotonic() < ends:
        try:
            with socket.create_connection((host, port), timeout=left(ends)) as zero:
                zero.sendall(f"{HELLO} {count} {index}".encode())
                zero.settimeout(left(ends) + 5)            # it gives up first, and says for whom it waited
                said = zero.recv(4096).decode(errors="replace")
        except OSError as error:
            why = error.strerror or str(error)
        else:
            if said == GO:
                return
            if said:
                raise ValueError(f"--hosts: {said}")
            why = "it has ended"
        time.sleep(min(0.5, left(ends)))
    raise ValueError(f"--hosts: process 0 of {count} is missing at {host}:{port} ({why}): start it, see that this "
                     f"machine reaches it, or give it longer (--hosts_timeout=SECONDS)")


def left(ends):
    return max(0.01, ends - time.monotonic())


def gone(other):
    """Whether who waits at the other end of a connection has ended."""
    other.setblocking(False)
    try:
        return other.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def tell(connections, word):
    for other in connections.values():
        with other:
            try:
                other.sendall(word.encode())
            except OSError:
                pass                                       # gone; jax will say so


def named(indices):
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
