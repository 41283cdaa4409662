"""A real Apptainer for tests, and the worker's image that it runs.

Debian has Apptainer in its unstable suite alone, built against a newer C library than a stable system has. So the package
and that library are unpacked into a folder, and its two programs are told to use the library that lies beside them: the
system keeps its own. It runs as on a cluster, rootless: no set-uid program, only user namespaces. An Apptainer that is
installed already is taken as it is.

Installing and building need root and apt; running needs neither. Both are done once: what is made is kept in a folder that
any user can read, by a digest of what it was made from, so a second call returns at once.

    program = install_apptainer(cache_folder())
    image = build_worker_image(program, cache_folder())
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from edif_hpc.testing.debian import PartMissing, download, install_packages, run

PACKAGES: Final = (
    "patchelf", "squashfs-tools", "squashfuse", "fuse-overlayfs", "uidmap", "libseccomp2", "libsqlite3-0", "e2fsprogs",
    "mmdebstrap", "debian-archive-keyring",
)  # fmt: skip
_DEBIAN: Final = Path("/etc/apt/sources.list.d/debian.sources")
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"

#: Every capability but SYS_RESOURCE, which root lacks in many a container of CI: asked for "all", Apptainer would fail.
_CAPABILITIES: Final = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_CHROOT", "SYS_PTRACE", "SYS_ADMIN", "SYS_NICE", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE",
    "AUDIT_CONTROL", "SETFCAP",
)  # fmt: skip


_REPOSITORY: Final = Path(__file__).parents[2]
#: What the image is made of, below the repository.
_INPUTS: Final = (
    "apptainer",
    "edif_hpc",
    "scripts/build-image",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
_SUITE: Final = "bookworm"
_PYTHON: Final = "3.11"  #: the suite's
_ROOT_PACKAGES: Final = (
    "python3", "python3-venv", "bash", "dash", "coreutils", "grep", "sed", "findutils", "procps", "base-files",
    "ca-certificates", "openssl", "netbase", "libstdc++6",
)  # fmt: skip
_TORCH_INDEX: Final = "https://download.pytorch.org/whl/cpu"
_KEPT: Final = 3
_BUILD_S: Final = 1200.0


def cache_folder() -> Path:
    """Where things are kept between runs. Root's home is closed to the users that run the image."""
    if os.geteuid() == 0:
        return Path("/var/cache/edif-hpc")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edif-hpc"


def install_apptainer(cache: Path) -> Path:
    """Install Apptainer below `cache`, unless there is one; returns its program.

    Raises:
        PartMissing: it would have to be installed, and that takes root on Debian.
        LaunchError: a step of the installation failed; the message ends with its words.
    """
    found = shutil.which("apptainer")
    if found:
        return Path(found)
    root = cache / "apptainer"
    program = root / "usr/bin/apptainer"
    with locked(cache / "apptainer.lock"):
        if not (root / "installed").exists():
            _may_install()
            _unpack(root)
            _relocate(root)
            (root / "installed").write_text(run([str(program), "--version"]))
    if os.geteuid() == 0:
        _prepare_machine()
    return program


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _may_install() -> None:
    if os.geteuid() != 0 or not _DEBIAN.exists():
        raise PartMissing(
            "there is no apptainer on PATH; tests install it themselves as root on Debian, elsewhere install the package"
        )


def _unpack(root: Path) -> None:
    """Fetch Apptainer and its C library from Debian's unstable suite, by apt but apart from the system's apt."""
    install_packages(*PACKAGES)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(mode=0o755)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        work.chmod(0o755)
        for each in ("lists/partial", "cache/archives/partial"):
            (work / each).mkdir(parents=True)
        suites = work / "suites.list"
        suites.write_text(f"deb [signed-by={_KEYRING}] {debian_mirror()} sid main\n")
        options = {
            "Dir::Etc::sourcelist": suites,
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::Lists": work / "lists",
            "Dir::Cache": work / "cache",
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
        run([*apt, "update"], timeout_s=300)
        run([*apt, "download", "apptainer", "libc6"], timeout_s=300, cwd=work)
        (package,), (library,) = work.glob("apptainer_*.deb"), work.glob("libc6_*.deb")
        run(["dpkg-deb", "-x", str(package), str(root)])
        run(["dpkg-deb", "-x", str(library), str(work / "libc")])
        shutil.copytree(work / "libc" / _LIBRARIES, root / "glibc", symlinks=True)


def _relocate(root: Path) -> None:
    """Make the unpacked programs use what lies beside them: library, settings, state."""
    glibc, libraries = root / "glibc", root / _LIBRARIES
    for program in (root / "usr/bin/apptainer", libraries / "apptainer/bin/starter"):
        loader = ["--set-interpreter", str(glibc / "ld-linux-x86-64.so.2")]
        path = ["--force-rpath", "--set-rpath", f"{glibc}:/{_LIBRARIES}"]
        run(["patchelf", *loader, *path, str(program)])
    # It looks for etc and var below its prefix; the starter takes usr/lib for that, because of Debian's multiarch path.
    (root / "etc").rename(root / "usr/etc")
    (root / "usr/var/lib/apptainer/mnt/session").mkdir(parents=True)
    for name in ("etc", "var"):
        (root / "usr/lib" / name).symlink_to(f"../{name}")
    settings = root / "usr/etc/apptainer"
    capabilities = {"users": {"root": [f"CAP_{name}" for name in _CAPABILITIES]}}
    (settings / "capability.json").write_text(json.dumps(capabilities))
    conf = settings / "apptainer.conf"
    text = re.sub(
        r"(?m)^root default capabilities = .*",
        "root default capabilities = file",
        conf.read_text(),
    )
    conf.write_text(re.sub(r"(?m)^systemd cgroups = .*", "systemd cgroups = no", text))


def _prepare_machine() -> None:
    """What an administrator sets up: ids for root's builds, and the usual mode of /dev/fuse, where no udev sets it."""
    for name in ("subuid", "subgid"):
        file = Path("/etc") / name
        text = file.read_text() if file.exists() else ""
        if "root:" not in text:
            file.write_text(f"{text}root:400000:65536\n")
    fuse = Path("/dev/fuse")
    if fuse.is_char_device() and fuse.stat().st_mode & 0o666 != 0o666:
        fuse.chmod(0o666)


def build_worker_image(program: Path, cache: Path) -> Path:
    """Build the CPU flavour of the worker's image, unless it was built from just these inputs; returns its path.

    It is what ships: the definition, the script and the lock of `apptainer/`, run by `scripts/build-image`. Only the base
    is another: no registry can be reached, so a Debian root of the same release takes the place of the registry's.

    Raises:
        PartMissing: it would have to be built, and that takes root.
        LaunchError: a step of the build failed; the message ends with its words.
    """
    images = cache / "images"
    image = images / f"worker-cpu-{_digest(_REPOSITORY, _INPUTS)}.sif"
    with locked(cache / "image.lock"):
        if image.exists():
            return image
        if os.geteuid() != 0:
            raise PartMissing(f"no image in {images}; tests build it themselves as root")
        images.mkdir(exist_ok=True, mode=0o755)
        for old in sorted(images.glob("*.sif"), key=lambda each: -each.stat().st_mtime)[
            _KEPT - 1 :
        ]:
            old.unlink()
        base, wheels = _debian_root(cache), _wheels(cache)
        facts = {"bootstrap": "localimage", "from": str(base)}
        arguments = [f"--build-arg={name}={value}" for name, value in facts.items()]
        # Compressed lightly: the image lives for a day, and the machine has two cores.
        squash = ["--mksquashfs-args", "-comp zstd -Xcompression-level 1"]
        command = [str(_REPOSITORY / "scripts/build-image"), "cpu", str(image), "--", "--fakeroot"]
        env = os.environ | {"APPTAINER": str(program), "PYTHON": sys.executable}
        run([*command, f"--bind={wheels}:/mnt", *arguments, *squash], env=env, timeout_s=_BUILD_S)
    return image


def _debian_root(cache: Path) -> Path:
    """A folder with a small Debian that has Python, like the base that the definitions name."""
    root = cache / f"{_SUITE}-{_short(' '.join(_ROOT_PACKAGES))}"
    if root.exists():
        return root
    install_packages("mmdebstrap", "debian-archive-keyring")
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("man", "doc", "locale")]
    half = root.with_suffix(".half")
    shutil.rmtree(half, ignore_errors=True)
    made = ["mmdebstrap", "--quiet", "--mode=root", "--variant=extract", *left_out]
    packages = f"--include={','.join(_ROOT_PACKAGES)}"
    run([*made, packages, _SUITE, str(half), debian_mirror()], timeout_s=600)
    # Extracted packages have not been configured: the rest is what their scripts would have made.
    for each in (
        "dev",
        "var/cache/apt",
        "var/lib/apt/lists",
    ):  # device nodes and folders of root alone cannot be packed
        shutil.rmtree(half / each)
    for each in (
        "dev",
        "etc/ssl/certs",
        "home",
        "mnt",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
        "var/tmp",
    ):
        (half / each).mkdir(parents=True, exist_ok=True)
    if not (half / "bin/sh").exists():
        (half / "bin/sh").symlink_to("dash")
    files = {"passwd": "root:x:0:0:root:/root:/bin/sh\n", "group": "root:x:0:\n"}
    for name, text in (files | dict.fromkeys(("hosts", "localtime", "resolv.conf"), "")).items():
        (half / "etc" / name).write_text(text)
    certificates = "etc/ssl/certs/ca-certificates.crt"
    shutil.copyfile(Path("/") / certificates, half / certificates)
    half.rename(root)
    return root


def _wheels(cache: Path) -> Path:
    """A folder with the files that the lock names; those of torch's index are looked for with pip's own settings first."""
    lock = _REPOSITORY / "apptainer/requirements-cpu.lock"
    folder = cache / f"wheels-{_short(lock.read_text())}"
    if folder.exists():
        return folder
    half = folder.with_suffix(".half")
    wanted = ["--only-binary=:all:", "--python-version", _PYTHON, "-r", str(lock)]
    asked = os.environ.get("EDIF_TORCH_INDEX")
    index = [f"--extra-index-url={asked}"] if asked else []
    try:
        download(*wanted, *index, folder=half, timeout_s=_BUILD_S)
    except PartMissing:
        download(*wanted, f"--extra-index-url={_TORCH_INDEX}", folder=half, timeout_s=_BUILD_S)
    half.rename(folder)
    return folder


def _digest(root: Path, names: tuple[str, ...]) -> str:
    found = hashlib.sha256()
    for name in names:
        top = root / name
        below = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in (each for each in below if each.is_file() and "__pycache__" not in each.parts):
            found.update(f"{path.relative_to(root)}\0{path.stat().st_mode & 0o111}\0".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def debian_mirror() -> str:
    """The mirror that this machine uses."""
    sources = _DEBIAN.read_text() if _DEBIAN.exists() else ""
    found = re.search(r"(?m)^URIs: *(\S+/debian)/*\s*$", sources)
    return found[1] if found else "http://deb.debian.org/debian"
