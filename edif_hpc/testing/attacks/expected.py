"""What becomes of each attempt, level by level, as data.

| outcome | means |
|---|---|
| denied | the system refused it inside, as an ordinary error |
| gone | it happened in the process of the request alone, and went with it |
| user, oom, timeout, limit, crash | the request ended with an ERROR of this kind |
| allowed | it is not prevented at this level |

A case may name the layer that it guards: without that layer it comes out otherwise (`tests/integration/worker/test_layers.py`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import msgpack

from edif_hpc.testing.attacks import payloads as p
from edif_hpc.worker.engine.values import Level

NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
MIB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attempt. `arguments` are facts for the payload; `{name}` in them stands for a fact of the place."""

    name: str
    payload: Callable[[Any, Any], Any]
    outcomes: Mapping[Level, frozenset[str]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    limits: str = "usual"  #: or `hasty`: a second, `small`: little memory and disk, or `little`: a small result
    returned: bool = False  #: what the payload returns is the request's result


def case(
    name: str,
    payload: Callable[[Any, Any], Any],
    outcomes: str,
    *,
    limits: str = "usual",
    returned: bool = False,
    **arguments: Any,
) -> Case:
    """One row; `outcomes` has one for all levels, or one for each, strongest first, and `|` between those that may be."""
    each = outcomes.split()
    columns = each * 3 if len(each) == 1 else each
    return Case(
        name=name,
        payload=payload,
        outcomes={
            level: frozenset(told.split("|")) for level, told in zip(Level, columns, strict=True)
        },
        arguments=arguments,
        limits=limits,
        returned=returned,
    )


_KERNEL: Final = {
    "mounts": (155, 161, 165, 166, 428, 429, 430, 431, 432, 433, 442, 467),
    "namespaces": (308,),
    "keys": (248, 249, 250),
    "programs in the kernel": (298, 321, 323, 425, 426, 427),
    "modules and machine": (
        103,
        163,
        167,
        168,
        169,
        170,
        171,
        172,
        173,
        175,
        176,
        179,
        246,
        313,
        320,
    ),
    "the clock": (159, 164, 227, 305),
    "handles and secrets": (212, 303, 304, 447),
    "System V and queues": (29, 64, 68, 240),
    "watching all files": (300,),
}
_FAMILIES: Final = {
    "IPv4": (socket.AF_INET, socket.SOCK_STREAM),
    "IPv4, datagrams": (socket.AF_INET, socket.SOCK_DGRAM),
    "IPv4, raw": (socket.AF_INET, socket.SOCK_RAW),
    "IPv6": (socket.AF_INET6, socket.SOCK_STREAM),
    "Unix": (socket.AF_UNIX, socket.SOCK_STREAM),
    "netlink": (16, socket.SOCK_RAW),
    "packet": (17, socket.SOCK_RAW),
    "vsock": (40, socket.SOCK_STREAM),
    "crypto": (38, socket.SOCK_SEQPACKET),
    "bluetooth": (31, socket.SOCK_RAW),
    "xdp": (44, socket.SOCK_RAW),
}
_ENDS: Final = {
    "exit": "crash",
    "segfault": "crash",
    "abort": "crash",
    "killed": "crash",
    "interrupt": "user",
    "leave": "user",
}


def _frame(name: str, **fields: Any) -> str:
    body: bytes = msgpack.packb([name, fields])
    return (len(body).to_bytes(4, "big") + body).hex()


_FRAMES: Final = {
    "garbage": "c1" * 64,
    "four gigabytes": "ffffffff",
    "deep": "000186a0" + "91" * 100_000,
    "a message of the zygote": _frame("Forked", executor=1, pid=1),
    "a truth for a size": _frame("Written", size=True),
}

FILES: Final = (
    case("read a file of the same account", p.read, "denied denied allowed", path="{secret}"),
    case("read the worker's key", p.read, "denied denied allowed", path="{order}"),
    case(
        "list the results and folders of others",
        p.listing,
        "denied denied allowed",
        path="{scratch}",
    ),
    case(
        "list the folder of another request",
        p.listing,
        "denied denied allowed",
        path="{neighbour}",
    ),
    case("list the relay's data", p.listing, "denied denied denied|allowed", path="{relay_data}"),
    case(
        "read the environment of the worker",
        p.read,
        "denied denied allowed",
        path="/proc/{worker}/environ",
    ),
    case(
        "read the memory of the worker",
        p.opened,
        "denied denied allowed",
        path="/proc/{worker}/mem",
    ),
    case(
        "read a file past its own root",
        p.read,
        "denied denied allowed",
        path="/proc/self/root{secret}",
    ),
    case(
        "read a file past the worker's root",
        p.read,
        "denied denied allowed",
        path="/proc/{worker}/root{secret}",
    ),
    case("read a file by a symbolic link", p.by_symlink, "denied denied allowed"),
    case("read a file by a hard link", p.by_hard_link, "denied denied allowed"),
    case("read a file from an open folder", p.by_descriptor, "denied denied allowed"),
    case("write a file of the same account", p.opened, "denied denied allowed", path="{secret}"),
    case("cut off a file", p.shortened, "denied denied allowed", path="{secret}"),
    case(
        "make a file in a folder of the account",
        p.created,
        "denied denied allowed",
        path="{outside}",
    ),
    case("make a file in /dev/shm", p.created, "gone denied allowed", path="/dev/shm"),  # noqa: S108
    case("make a file in /tmp", p.created, "denied denied allowed", path="/tmp"),  # noqa: S108
    case("move a file out of its folder", p.moved_out, "denied denied allowed"),
    case("write the model's files", p.opened, "denied denied allowed", path="{weights}"),
    case("write the zygote's home", p.created, "denied denied allowed", path="{home}"),
    case(
        "write the code of the engine",
        p.opened,
        "denied denied denied|allowed",
        path="{package}/errors.py",
    ),
    *(
        case(f"change the mode of {name}", p.mode_changed, "denied gone gone", path=path)
        for name, path in {
            "a file": "{secret}",
            "the model's files": "{weights}",
            "the engine's folder": "{scratch}",
        }.items()
    ),
    case("change the times of a file", p.time_changed, "denied gone gone"),
    case("set an attribute of a file", p.attribute_set, "denied"),
    case("see that a file exists", p.seen, "allowed"),
    case("make the node of a disk", p.device, "denied"),
    case("lock a file of the model", p.lingering, "gone"),
    *(
        case(f"have others wait for {name}", p.leased, "denied", path=path)
        for name, path in {"the result": "the result", "the model": "{weights}"}.items()
    ),
    case("leave a folder that is hard to remove", p.traps_left, "gone gone|limit gone|limit"),
    *(
        case(f"open {path}", p.opened, "denied denied denied|allowed", path=path)
        for path in (
            "/dev/mem",
            "/dev/kvm",
            "/dev/fuse",
            "/dev/tty",
            "/dev/userfaultfd",
            "/dev/net/tun",
        )
    ),
)

PROCESSES: Final = (
    case(
        "be the last to end when memory runs out",
        p.opened,
        "denied denied allowed",
        path="/proc/self/oom_score_adj",
    ),
    case("see other processes", p.processes, "denied|gone denied allowed"),
    case("signal the worker", p.signalled, "denied"),
    case("share the process group of others", p.grouped, "denied"),
    case("reschedule the worker", p.rescheduled, "denied denied denied|allowed"),
    case("debug the worker", p.traced, "denied denied denied|allowed"),
    *(
        case(
            f"share the {kind} namespace of others",
            p.same_namespace,
            "denied allowed allowed",
            kind=kind,
        )
        for kind in ("user", "pid", "mnt", "net", "ipc")
    ),
    case("outlive its zygote", p.unparented, "denied"),
    case("hold privileges", p.privileged, "denied"),
    case("leave a daemon", p.daemon, "gone denied denied"),
    *(
        case(f"ask the kernel: {name}", p.asked, "denied", numbers=numbers)
        for name, numbers in _KERNEL.items()
    ),
    case(
        "make a user namespace",
        p.asked,
        "denied",
        numbers=(272, 56),
        arguments=(0x10000000, 0, 0, 0, 0),
    ),
)

NETWORK: Final = (
    *(
        case(f"make a socket: {name}", p.connected, "denied", family=int(family), type=int(kind))
        for name, (family, kind) in _FAMILIES.items()
    ),
    case("dial by another program", p.dialled, "denied"),
    case("send to a bound socket", p.sent_aside, "denied", address="{datagrams}"),
    case("send to an abstract socket", p.sent_aside, "denied", address="\0{abstract}"),
    case("send descriptors to the worker", p.descriptors_sent, "denied"),
    case("use a descriptor of others", p.inherited, "denied"),
)

EXHAUSTION: Final = (
    case("fork without end", p.forks, "denied|oom|limit denied denied", most=5000),
    case("keep all processors busy", p.busy, "timeout denied denied", limits="hasty"),
    case("start threads without end", p.threads, "user|oom|limit", limits="small", most=20_000),
    *(
        case(f"fill memory: {sort}", p.memory, outcomes, limits="small", sort=sort, most=1 << 29)
        for sort, outcomes in {
            "own": "oom|denied",
            "shared": "oom",
            "memfd": "denied|oom",
            "children": "oom denied denied",
        }.items()
    ),
    *(
        case(f"fill the disk: {sort}", p.disk, outcomes, limits="small", sort=sort, most=most)
        for sort, outcomes, most in (
            ("big", "denied|limit", 1 << 30),
            ("many", "denied|limit limit limit", 1 << 30),
            ("small", "denied limit limit", 100_000),
            ("sparse", "denied", 1 << 30),
        )
    ),
    *(
        case(f"open descriptors: {sort}", p.descriptors, "denied", sort=sort, most=5000)
        for sort in ("file", "pipe", "pair", "epoll", "inotify")
    ),
    case("open descriptors in many processes", p.hoarded, "limit denied denied"),
    case("open descriptors that nobody counts", p.unshared, "denied"),
    case("fill what is in flight between sockets", p.in_flight, "denied"),
    case("return too much", p.oversized, "limit", limits="little", returned=True, most=8 * MIB),
    case("print without end", p.printed, "limit|crash"),
)

ENDS: Final = (
    *(
        case(f"never end: {sort}", p.endless, "timeout", limits="hasty", sort=sort)
        for sort in ("python, signals blocked", "native", "torch", "deadlock", "asleep")
    ),
    *(case(f"end itself: {sort}", p.ended, kind, sort=sort) for sort, kind in _ENDS.items()),
)

TRACES: Final = (
    case("replace functions of libraries", p.patched, "gone|user|crash"),
    case("poison caches", p.poisoned, "gone"),
    *(
        case(f"change weights: {sort}", p.weights_changed, "gone|denied", sort=sort)
        for sort in ("in place", "memory", "protection")
    ),
    case("open the file behind the weights", p.mapping_opened, "denied"),
    case("leave hooks, states and threads", p.left_behind, "gone"),
)

RESULTS: Final = (
    case("return what explodes when it is loaded", p.explosive, "gone", returned=True),
    *(
        case(f"a frame to the worker: {name}", p.framed, "crash", frame=frame)
        for name, frame in _FRAMES.items()
    ),
    case(
        "frames to the worker without end",
        p.framed,
        "crash",
        frame=_frame("Written", size=0),
        times=100_000,
    ),
    *(
        case(f"a result that is {sort} than announced", p.result_forged, "crash", sort=sort)
        for sort in ("shorter", "longer")
    ),
    case(
        "a frame without an end", p.framed, "timeout", limits="hasty", frame="00010000" + "00" * 64
    ),
    case(
        "a message without an end",
        p.framed,
        "crash",
        frame=_frame("Broken", kind="user", message="x" * MIB, lacked_gradients=False, meta={}),
    ),
    case("tell what only others may tell", p.meta_forged, "gone"),
    case("tell more than anybody reads", p.meta_forged, "gone|crash", size=1_200_000),
)

CASES: Final = (*FILES, *PROCESSES, *NETWORK, *EXHAUSTION, *ENDS, *TRACES, *RESULTS)

#: Which case comes out otherwise at the full level when a layer is left out.
GUARDS: Final[Mapping[str, str]] = {
    "namespaces": "see other processes",
    "mounts": "share the mnt namespace of others",
    "scratch": "fill the disk: small",
    "shm": "make a file in /dev/shm",
    "proc": "see other processes",
    "user": "share the user namespace of others",
    "session": "share the process group of others",
    "privileges": "hold privileges",
    "limits": "open descriptors: file",
    "parent": "outlive its zygote",
    "landlock": "read a file of the same account",
    "seccomp": "make a socket: IPv4",
    "watch": "fill memory: shared",
}
