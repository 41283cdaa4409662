"""What hostile requests run: one function for each attempt, sent as a part of an ordinary traced block.

A function gets facts of the place where it runs (`where`: paths, process ids, and the arguments of its case), and `model`. It returns what it
got, which means that the attempt succeeded; it raises `OSError` where the system refused; or it does not come back. It stands for itself:
its source travels, so it imports what it uses, and of this module it may only use `call`.
"""

from __future__ import annotations

from typing import Any


def call(number: int, *arguments: Any) -> int:
    """Make a system call; raise what it fails with."""
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    given = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


# -- files of others -----------------------------------------------------------------------------------------------------


def read(model: Any, where: Any) -> Any:
    """Read a file."""
    with open(where["path"], "rb") as file:
        return file.read(64)


def listing(model: Any, where: Any) -> Any:
    """List a folder."""
    import os

    return os.listdir(where["path"])


def opened(model: Any, where: Any) -> Any:
    """Open a file for writing."""
    import os

    os.close(os.open(where["path"], os.O_RDWR))
    return where["path"]


def created(model: Any, where: Any) -> Any:
    """Make a file in a folder that is not its own."""
    import os

    path = os.path.join(where["path"], where["name"])
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))


def shortened(model: Any, where: Any) -> Any:
    """Cut off the end of a file, as long as it is."""
    import os

    os.truncate(where["path"], os.stat(where["path"]).st_size)
    return where["path"]


def by_symlink(model: Any, where: Any) -> Any:
    """Read a file through a link in its own folder."""
    import os

    os.symlink(where["secret"], "innocent")
    with open("innocent", "rb") as file:
        return file.read(64)


def by_hard_link(model: Any, where: Any) -> Any:
    """Bring a file into its own folder under another name, and read it there."""
    import os

    os.link(where["secret"], "innocent")
    with open("innocent", "rb") as file:
        return file.read(64)


def moved_out(model: Any, where: Any) -> Any:
    """Make a file in its own folder and move it out."""
    import os

    open("innocent", "w").close()
    os.rename("innocent", os.path.join(where["outside"], where["name"]))
    return where["outside"]


def by_descriptor(model: Any, where: Any) -> Any:
    """Climb out of its own folder from an open descriptor."""
    import os

    here = os.open(".", os.O_PATH)
    fd = os.open("../" * 40 + where["secret"].lstrip("/"), os.O_RDONLY, dir_fd=here)
    return os.read(fd, 64)


def mode_changed(model: Any, where: Any) -> Any:
    """Change who may use a file; put it back if that worked."""
    import os

    before = os.stat(where["path"]).st_mode
    os.chmod(where["path"], before & 0o7777 ^ 0o040)
    if os.stat(where["path"]).st_mode != before:
        os.chmod(where["path"], before & 0o7777)
        return oct(before)
    return None


def time_changed(model: Any, where: Any) -> Any:
    """Change the times of a file."""
    import os

    os.utime(where["secret"], (0, 0))
    return "changed" if os.stat(where["secret"]).st_mtime == 0 else None


def attribute_set(model: Any, where: Any) -> Any:
    """Hang an extended attribute on a file."""
    import os

    os.setxattr(where["secret"], "user.edif", b"x")
    return "set"


def seen(model: Any, where: Any) -> Any:
    """See that a file of another exists, and how large it is."""
    import os

    return os.stat(where["secret"]).st_size


def device(model: Any, where: Any) -> Any:
    """Make and open a node of a disk."""
    import os
    import stat

    os.mknod("disk", stat.S_IFBLK | 0o600, os.makedev(254, 0))
    return os.read(os.open("disk", os.O_RDONLY), 1)


def lingering(model: Any, where: Any) -> Any:
    """Take the lock of a model's file, and keep it."""
    import fcntl
    import os

    fd = os.open(where["weights"], os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def leased(model: Any, where: Any) -> Any:
    """Have whoever opens a file wait: the worker at the result, others at the model."""
    import fcntl
    import os

    number = 4 if where["path"] == "the result" else os.open(where["path"], os.O_RDONLY)
    fcntl.fcntl(number, 1024, fcntl.F_WRLCK)
    return fcntl.fcntl(number, 1025)


def traps_left(model: Any, where: Any) -> Any:
    """Leave a folder that is hard to remove: deep, closed, with odd names and links to others."""
    import os

    top = os.getcwd()
    os.symlink(where["outside"], "a link to others")
    os.mkdir("closed")
    open("closed/file", "w").close()
    os.chmod("closed", 0)
    os.mkdir(b"\xff\xfe")
    for _ in range(3000):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(top)


# -- other processes -----------------------------------------------------------------------------------------------------


def processes(model: Any, where: Any) -> Any:
    """See processes that are not its own."""
    import os

    shown = {int(each) for each in os.listdir("/proc") if each.isdigit()}
    return sorted(shown - {os.getpid()}) or None


def signalled(model: Any, where: Any) -> Any:
    """Send the worker a signal by every call that sends one."""
    import signal

    pid, number, got = where["worker"], int(signal.SIGCONT), []
    info = b"\0" * 128
    attempts: dict[str, tuple[Any, ...]] = {
        "kill": (62, pid, number),
        "tkill": (200, pid, number),
        "tgkill": (234, pid, pid, number),
        "queue": (129, pid, number, info),
        "to a thread's queue": (297, pid, pid, number, info),
        "to all": (62, -1, 0),
    }
    for name, attempt in attempts.items():
        try:
            call(*attempt)
            got.append(name)
        except OSError:
            continue
    try:
        call(424, call(434, pid, 0), number, None, 0)
        got.append("by a descriptor")
    except OSError as error:
        if not got:
            raise PermissionError(error) from error
    return got


def grouped(model: Any, where: Any) -> Any:
    """Find itself in the process group of those who forked it, whom a signal or a priority for the group would reach."""
    import os

    if os.getpgrp() == os.getpid():
        raise PermissionError("nobody else is in it")
    return os.getpgrp()


def rescheduled(model: Any, where: Any) -> Any:
    """Change how the worker is scheduled, and its limits."""
    import os

    got = []
    for attempt in ((141, 0, where["worker"], 19), (251, 1, where["worker"], 3 << 13)):
        try:
            call(*attempt)
            got.append(attempt[0])
        except OSError:
            continue
    try:
        os.sched_setaffinity(where["worker"], {0})
        got.append(203)
    except OSError as error:
        if not got:
            raise PermissionError(error) from error
    return got


def traced(model: Any, where: Any) -> Any:
    """Look into the worker's memory, or take its descriptors, by the calls of debuggers."""
    import ctypes

    pid, got = where["worker"], []
    buffer = ctypes.create_string_buffer(64)
    for number, arguments in {
        101: (16, pid, 0, 0),
        310: (pid, buffer, 1, buffer, 1, 0),
        311: (pid, buffer, 1, buffer, 1, 0),
        312: (pid, pid, 0, 0, 0),
        279: (pid, 0, 0, 0, 0, 0),
        256: (pid, 8, buffer, buffer),
        274: (pid, buffer, buffer),
    }.items():
        try:
            call(number, *arguments)
            got.append(number)
        except OSError:
            continue
    try:
        call(438, call(434, pid, 0), 0, 0)
        got.append(438)
    except OSError as error:
        if not got:
            raise PermissionError(error) from error
    return got


def same_namespace(model: Any, where: Any) -> Any:
    """Find itself in a namespace of those who forked it."""
    import os

    if os.stat(f"/proc/self/ns/{where['kind']}").st_ino != where["namespaces"][where["kind"]]:
        raise PermissionError("a namespace of its own")
    return where["kind"]


def unparented(model: Any, where: Any) -> Any:
    """Stay alive when the process that forked it dies."""
    import ctypes

    told = ctypes.c_int(0)
    try:
        call(157, 1, 0, 0, 0, 0)
    except OSError:
        pass
    call(157, 2, ctypes.byref(told), 0, 0, 0)
    if told.value == 9:
        raise PermissionError("it is killed with its parent")
    return told.value


def privileged(model: Any, where: Any) -> Any:
    """Have a capability, or be able to gain one."""
    with open("/proc/self/status") as file:
        status = {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    held = [kind for kind in ("Inh", "Prm", "Eff", "Amb") if int(status[f"Cap{kind}"], 16)]
    if not held and status["NoNewPrivs"] == "1":
        raise PermissionError("none held, none to be gained")
    return held


def daemon(model: Any, where: Any) -> Any:
    """Leave a process behind that belongs to nobody."""
    import os
    import time

    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(0)


# -- the kernel ----------------------------------------------------------------------------------------------------------


def asked(model: Any, where: Any) -> Any:
    """Ask the kernel for what no request needs; what it does not refuse counts."""
    import errno

    refusals = {errno.EPERM, errno.EACCES, errno.ENOSYS}
    got = []
    for number in where["numbers"]:
        try:
            call(number, *where.get("arguments", (0, 0, 0, 0, 0, 0)))
            got.append(number)
        except OSError as error:
            if error.errno not in refusals:
                got.append(number)
    if not got:
        raise PermissionError("all refused")
    return got


# -- the network ---------------------------------------------------------------------------------------------------------


def connected(model: Any, where: Any) -> Any:
    """Make a socket of a family."""
    import socket

    with socket.socket(where["family"], where["type"]) as sock:
        return sock.fileno()


def dialled(model: Any, where: Any) -> Any:
    """Let another program dial the relay."""
    import subprocess

    told = subprocess.run(
        ["/bin/bash", "-c", f"echo > /dev/tcp/127.0.0.1/{where['port']}"],
        capture_output=True,
        check=False,
        timeout=30,
    )
    if told.returncode:
        raise PermissionError(told.stderr)
    return told.returncode


def sent_aside(model: Any, where: Any) -> Any:
    """Send a datagram to a socket that another has bound, from the end of a pair."""
    import socket

    ours, _theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return ours.sendto(b"from an attack", where["address"])


def descriptors_sent(model: Any, where: Any) -> Any:
    """Fill the worker with descriptors, beside frames that are in order."""
    import os
    import socket
    import struct

    body = b"\x92\xa3Log\x81\xa4text\xa1x"
    with socket.socket(fileno=os.dup(3)) as worker, open(os.devnull) as null:
        for _ in range(10):
            socket.send_fds(worker, [struct.pack(">I", len(body)) + body], [null.fileno()] * 50)


def inherited(model: Any, where: Any) -> Any:
    """Find a descriptor that somebody forgot to close."""
    import os

    found = []
    for fd in range(5, 4096):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    strange = [
        each for each in found if each.startswith(("socket:", "/")) and "/dev/null" not in each
    ]
    if not strange:
        raise PermissionError("none but its own")
    return strange


# -- exhaustion ----------------------------------------------------------------------------------------------------------


def forks(model: Any, where: Any) -> Any:
    """Start processes without end."""
    import os
    import signal

    for _ in range(where["most"]):
        if os.posix_spawn("/bin/sleep", ["sleep", "3600"], os.environ) < 0:
            signal.pause()
    return where["most"]


def busy(model: Any, where: Any) -> Any:
    """Keep all processors busy with many processes."""
    import os

    for _ in range(200):
        os.posix_spawn("/bin/sh", ["sh", "-c", "while :; do :; done"], os.environ)
    while True:
        pass


def threads(model: Any, where: Any) -> Any:
    """Start threads without end."""
    import threading

    forever = threading.Event()
    for _ in range(where["most"]):
        threading.Thread(target=forever.wait, daemon=True).start()
    return where["most"]


def memory(model: Any, where: Any) -> Any:
    """Fill memory of one sort, in steps, and wait."""
    import mmap
    import os
    import time

    kept = []
    step = 32 << 20
    for number in range(where["most"] // step):
        if where["sort"] == "own":
            kept.append(mmap.mmap(-1, step, flags=mmap.MAP_PRIVATE))
        elif where["sort"] == "shared":
            kept.append(mmap.mmap(-1, step))
        elif where["sort"] == "memfd":
            fd = os.memfd_create(f"m{number}")
            os.write(fd, bytes(step))
            continue
        elif where["sort"] == "children":
            if os.fork() == 0:
                kept.append(mmap.mmap(-1, step, flags=mmap.MAP_PRIVATE))
                kept[-1].write(b"x" * step)
                time.sleep(3600)
            continue
        kept[-1].write(b"x" * step)
    time.sleep(where["patience"])
    return len(kept)


def disk(model: Any, where: Any) -> Any:
    """Fill the disk with files, one or many, and wait."""
    import os
    import time

    if where["sort"] == "small":
        for number in range(where["most"]):
            os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY))
    written = 0 if where["sort"] != "small" else where["most"]
    while written < where["most"]:
        with open("big" if where["sort"] == "big" else f"big{written}", "ab") as file:
            if where["sort"] == "sparse":
                file.truncate(1 << 50)
            written += file.write(bytes(8 << 20))
    time.sleep(where["patience"])
    return written


def descriptors(model: Any, where: Any) -> Any:
    """Open descriptors of one sort without end."""
    import os
    import select
    import socket

    kept: list[Any] = []
    makers: dict[str, Any] = {
        "file": lambda: os.open("/dev/null", os.O_RDONLY),
        "pipe": os.pipe,
        "pair": socket.socketpair,
        "epoll": select.epoll,
        "inotify": lambda: call(294, 0),
    }
    for _ in range(where["most"]):
        kept.append(makers[where["sort"]]())
        if where["sort"] == "pipe":
            os.set_blocking(kept[-1][1], False)
            os.write(kept[-1][1], bytes(65536))
    return len(kept)


def hoarded(model: Any, where: Any) -> Any:
    """Open descriptors in many processes, each of which may have some."""
    import os
    import socket
    import time

    for _ in range(12):
        if os.fork() == 0:
            kept = [socket.socketpair() for _ in range(400)]
            time.sleep(3600 + len(kept))
    time.sleep(where["patience"])
    return "kept"


def unshared(model: Any, where: Any) -> Any:
    """Have descriptors for this thread alone, which nobody counts."""
    return str(call(436, 1 << 20, 1 << 20, 2))


def in_flight(model: Any, where: Any) -> Any:
    """Use up what the kernel allows a user to have in flight between sockets."""
    import os
    import socket

    sent = 0
    kept = []
    with open(os.devnull) as null:
        for _ in range(100):
            kept.append(socket.socketpair())
            socket.send_fds(kept[-1][0], [b"x"], [null.fileno()] * 200)
            sent += 200
    return sent


# -- no end, or a sudden one ---------------------------------------------------------------------------------------------


def endless(model: Any, where: Any) -> Any:
    """Never end, in one of many ways."""
    import re
    import signal
    import threading
    import time

    sort = where["sort"]
    if sort in {"python, signals blocked", "stopped"}:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    if sort == "native":
        re.match(r"(a+)+$", "a" * 64 + "b")
    elif sort == "torch":
        import torch

        big = torch.ones(2000, 2000)
        while True:
            big = big @ big
    elif sort == "deadlock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif sort == "asleep":
        while True:
            time.sleep(3600)
    while True:
        pass


def ended(model: Any, where: Any) -> Any:
    """End its own process in one of many ways."""
    import ctypes
    import os
    import signal

    sort = where["sort"]
    if sort == "exit":
        os._exit(0)
    if sort == "segfault":
        ctypes.string_at(0)
    if sort == "abort":
        os.abort()
    if sort == "killed":
        # Process 1 of a namespace does not hear this from inside.
        os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    if sort == "interrupt":
        raise KeyboardInterrupt
    raise SystemExit(0)


# -- what the next request would find ------------------------------------------------------------------------------------


def patched(model: Any, where: Any) -> Any:
    """Replace what torch, nnsight, pickle and the serializer are made of."""
    import pickle

    import nnsight
    import torch
    import zstandard

    def wrong(*arguments: Any, **more: Any) -> Any:
        return 0

    for owner, name in (
        (torch.nn.Linear, "forward"),
        (torch.nn.functional, "softmax"),
        (torch.nn.LayerNorm, "forward"),
        (pickle, "Pickler"),
        (zstandard, "ZstdDecompressor"),
        (nnsight, "LanguageModel"),
    ):
        setattr(owner, name, wrong)


def poisoned(model: Any, where: Any) -> Any:
    """Poison the caches of Python, nnsight and torch."""
    import linecache
    import os
    import sys

    from nnsight.tracing import globals as traced

    linecache.cache.clear()
    for cache in (traced.SOURCES, traced.BLOCKS):
        cache.clear()
    for name in [each for each in sys.modules if each.startswith("transformers.models.gpt2")]:
        del sys.modules[name]
    sys.path.insert(0, os.getcwd())
    for name in ("sitecustomize.py", "torch.py", "nnsight.py", "usercustomize.py"):
        with open(name, "w") as file:
            file.write("raise SystemExit('poisoned')")
    os.environ["LD_PRELOAD"] = os.path.abspath("evil.so")
    os.environ["PYTHONPATH"] = os.getcwd()


def weights_changed(model: Any, where: Any) -> Any:
    """Change the model's weights, beside what torch sees."""
    import ctypes
    import mmap

    import torch

    sort = where["sort"]
    for weight in model._module.parameters():
        address, size = weight.data_ptr(), weight.nbytes
        if sort == "in place":
            with torch.no_grad():
                weight.zero_()
        elif sort == "memory":
            with open("/proc/self/mem", "r+b", buffering=0) as own:
                own.seek(address)
                own.write(bytes(min(size, 4096)))
        else:
            page = address // mmap.PAGESIZE * mmap.PAGESIZE
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 7)
            ctypes.memset(address, 255, min(size, 64))


def mapping_opened(model: Any, where: Any) -> Any:
    """Open the file behind the weights for writing, by its mapping."""
    import os

    address = next(model._module.parameters()).data_ptr()
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0] for line in maps if "weights" in line]
    span = next(s for s in spans if int(s.split("-")[0], 16) <= address < int(s.split("-")[1], 16))
    fd = os.open(f"/proc/self/map_files/{span}", os.O_RDWR)
    return os.pwrite(fd, b"\0" * 4096, 0)


def left_behind(model: Any, where: Any) -> Any:
    """Leave hooks, random states, defaults, threads and handlers behind."""
    import atexit
    import gc
    import random
    import signal
    import sys
    import threading
    import time

    import numpy as np
    import torch

    model._module.register_forward_hook(lambda *_: 0)
    torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    sys.setrecursionlimit(10_000)
    atexit.register(time.sleep, 3600)
    gc.callbacks.append(lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=time.sleep, args=(3600,)).start()


# -- results and frames --------------------------------------------------------------------------------------------------


def explosive(model: Any, where: Any) -> Any:
    """Return a value that runs code in whoever unpickles it."""

    class Bomb:
        def __reduce__(self) -> Any:
            return eval, (
                f"open({where['marker']!r}, 'a').write(str(__import__('os').getpid()) + '\\n')",
            )

    return Bomb()


def oversized(model: Any, where: Any) -> Any:
    """Return more than a request may."""
    import os

    return os.urandom(where["most"])


def framed(model: Any, where: Any) -> Any:
    """Speak to the worker itself, past the code that should."""
    import os
    import time

    left = memoryview(bytes.fromhex(where["frame"]) * where.get("times", 1))
    while left:
        left = left[os.write(3, left) :]
    while True:
        time.sleep(3600)


def result_forged(model: Any, where: Any) -> Any:
    """Announce a result in the file, and then have another one there."""
    import os
    import time

    import msgpack

    def say(name: str, **fields: Any) -> None:
        body = msgpack.packb([name, fields])
        os.write(3, len(body).to_bytes(4, "big") + body)

    os.write(4, bytes(40 << 20))
    say("Written", size=40 << 20)
    if where["sort"] == "shorter":
        os.ftruncate(4, 1 << 20)
    if where["sort"] == "longer":
        os.ftruncate(4, 41 << 20)
    say("Done", inline=None, size=40 << 20, meta={})
    while True:
        time.sleep(3600)


def meta_forged(model: Any, where: Any) -> Any:
    """Say of itself what only others may say."""
    import io
    import os
    import time

    import msgpack
    import torch
    import zstandard

    told = {
        "attempt": 99,
        "runtime": 0.0,
        "runtime_s": -1.0,
        "queued_s": 1e9,
        "cpu_s": 0.0,
        "worker": "another",
    }
    saved = io.BytesIO()
    torch.save({"told": {"end": "done", "text": ""}}, saved)
    inline = zstandard.compress(saved.getvalue())
    body = msgpack.packb(["Done", {"inline": inline, "size": len(inline), "meta": told}])
    os.write(3, len(body).to_bytes(4, "big") + body)
    while True:
        time.sleep(3600)


def printed(model: Any, where: Any) -> Any:
    """Print without end."""
    while True:
        print("x" * 1000)
