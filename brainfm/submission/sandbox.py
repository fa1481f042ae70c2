"""A process without network that is watched: what it prints, how long it takes, what it opens and writes.

The network is cut by a namespace of its own (``unshare --net``), where the machine allows it. Attempts are seen by a
Python audit hook that the process loads as ``sitecustomize``: it notes sockets and files opened for writing, also in
children; where there is no namespace, it refuses connections as well. Programs that are not Python escape the hook, and
Python started with ``-S``, ``-I`` or ``-E`` does; the namespace holds for all.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HOOK, LOG = "hook", "watched.log"  # below the folder of a run

_CUT = ("unshare", "--map-root-user", "--net", "--")
_KEPT = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "SYSTEMROOT")
_WRITABLE = ("/tmp", "/dev", "/proc/self", "/var/tmp", "/output", "/watch")

_HOOK = '''"""Notes what this process opens: brainfm/submission/sandbox.py."""
import os
import sys

_log = os.open(os.environ["BRAINFM_WATCH"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
_cut = os.environ["BRAINFM_WATCH_CUT"] == "1"
_FAMILIES = {1: "local (AF_UNIX)", 2: "internet (AF_INET)", 10: "internet (AF_INET6)"}
_busy = False


def _say(kind, what):
    text = str(what).replace("\\n", " ").replace("\\t", " ")
    os.write(_log, f"{kind}\\t{text}\\n".encode(errors="backslashreplace"))


def _hook(event, args):
    global _busy
    if _busy or not event.startswith(("socket.", "open")):
        return
    _busy = True
    try:
        if event == "open":
            path, mode, flags = args
            wants = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else 0
            if wants and isinstance(path, (str, bytes)):
                _say("write", os.path.realpath(os.fsdecode(path)))
        elif event == "socket.__new__":
            _say("socket", _FAMILIES.get(int(args[1]), f"family {int(args[1])}"))
        elif event in ("socket.connect", "socket.sendto", "socket.bind"):
            _say("connect", args[1])
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            _say("connect", args[0])
    finally:
        _busy = False
    if not _cut and event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        if event.startswith("socket.get") or not isinstance(args[1], (str, bytes)):
            raise OSError(101, "Network is unreachable")


sys.addaudithook(_hook)
_say("loaded", os.getpid())
'''


@dataclass(frozen=True)
class Ran:
    """What became of a process.

    Attributes:
        code: its exit code; None: it was stopped at the limit, negative: it was ended by that signal.
        seconds: from start to end.
        out, err: what it printed.
        sockets: of which kinds it opened sockets, and where it connected to.
        writes: files outside the places that may be written to.
        watched: whether the hook reported; else sockets and writes are unknown.
    """

    code: int | None
    seconds: float
    out: str
    err: str
    sockets: tuple[str, ...]
    writes: tuple[str, ...]
    watched: bool


@functools.cache
def network_is_cut() -> bool:
    """Whether this machine lets a process have a network namespace of its own."""
    return shutil.which("unshare") is not None and succeeds([*_CUT, "true"])


def succeeds(words: Sequence[str], limit_s: float = 20.0) -> bool:
    """Whether a program is there, ends in time, and with 0; what it prints is dropped."""
    try:
        return subprocess.run(words, capture_output=True, timeout=limit_s).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def isolation() -> str:
    """How the network is kept away here, for people."""
    if network_is_cut():
        return "no network: a network namespace of its own, and a Python audit hook that notes every socket"
    return "no network namespace is allowed here: a Python audit hook refuses connections, other programs are not held"


def run(
    words: Sequence[str],
    folder: Path,
    *,
    limit_s: float,
    writable: Sequence[Path] = (),
    cut: bool = True,
    more: Mapping[str, str] | None = None,
) -> Ran:
    """Runs a program with an environment of its own: no HOME, a temporary folder of its own, nothing of the caller's.

    Args:
        words: program and arguments.
        folder: where it starts, and where the log of the hook lies; made where it is missing.
        limit_s: after which it and its children are stopped.
        writable: further places that it may write to.
        cut: whether the network is cut by a namespace where that is allowed.
        more: further variables of its environment.
    """
    hook, log = folder / HOOK, folder / HOOK / LOG
    hook.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    (hook / "sitecustomize.py").write_text(_HOOK, encoding="utf-8")
    cut = cut and network_is_cut()
    environment = {
        "PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": "/nonexistent",
        "PYTHONPATH": str(hook), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1",
        "BRAINFM_WATCH": str(log), "BRAINFM_WATCH_CUT": str(int(cut)),
        **{name: os.environ[name] for name in _KEPT if name in os.environ}, **(more or {}),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="brainfm-") as temporary:  # short: a socket's path may have 108 letters
        environment["TMPDIR"] = temporary
        began = time.monotonic()
        code, out, err = _finished([*(_CUT if cut else ()), *words], environment, folder, limit_s)
        seconds = time.monotonic() - began
        sockets, writes, watched = _read(log, [Path(temporary), *writable])
    return Ran(code, seconds, out, err, sockets, writes, watched)


def _finished(
    words: Sequence[str], environment: Mapping[str, str], folder: Path, limit_s: float
) -> tuple[int | None, str, str]:
    """Exit code and text; a group of processes, so that none outlives the limit."""
    try:
        process = subprocess.Popen(
            words, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return 127, "", f"{words[0]}: {error.strerror or error}"
    try:
        out, err = process.communicate(timeout=limit_s)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        code = None
    return code, out.decode(errors="replace"), err.decode(errors="replace")


def _read(log: Path, writable: Sequence[Path]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    if not log.is_file():
        return (), (), False
    noted = [line.split("\t", 1) for line in log.read_text(errors="replace").splitlines() if "\t" in line]
    allowed = [os.path.realpath(place) for place in writable] + list(_WRITABLE)
    shown = {"socket": "a socket, ", "connect": "to "}
    sockets = [shown[kind] + what for kind, what in noted if kind in shown]
    writes = [what for kind, what in noted if kind == "write" and not _inside(what, allowed)]
    return tuple(dict.fromkeys(sockets)), tuple(dict.fromkeys(writes)), any(kind == "loaded" for kind, _ in noted)


def _inside(path: str, places: Sequence[str]) -> bool:
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)
