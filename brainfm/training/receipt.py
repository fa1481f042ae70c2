"""Receipt of a run: samples, hours, memory, energy; over all its sessions, however often it was interrupted.

Counted up to the last checkpoint: what a killed session did after it is done again, and is not counted twice.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from brainfm.batch import Batch

FILE = "receipt.json"
_SUMS = ("samples", "patches", "voxels", "cpu_hours")  # over processes and sessions
_TIMES = ("wall_hours", "probe_hours")  # over sessions; every process waits as long as the others


class Meter:
    """Counts on one process from now on, and adds what earlier sessions of the run have cost.

    Args:
        before: the receipt of the run's checkpoint; empty for a new run.
    """

    def __init__(self, device: torch.device, before: Mapping[str, Any]) -> None:
        self.device, self.before = device, dict(before)
        self._samples = self._patches = self._voxels = 0
        self._began, self._cpu, self._probed = time.perf_counter(), cpu_seconds(), 0.0
        self._energy, self._packages = energy_counter(device), Packages()
        self._joule = self._energy() if self._energy else 0.0

    def saw(self, batch: Batch) -> None:
        """Counts a batch, while it still lies on the CPU."""
        views = batch.image.shape[1] if batch.image.ndim == 6 else 1
        patches = int(batch.image.shape[0] * batch.image.shape[-4]) * views
        if batch.present is not None:
            patches = int(batch.present.sum()) * views
        if batch.partner is not None:
            patches += len(batch) if batch.paired is None else int(batch.paired.sum())
        self._samples += len(batch)
        self._patches += patches
        self._voxels += patches * math.prod(batch.image.shape[-3:])

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Within, the time counts as spent on probes too."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._probed += time.perf_counter() - began

    def read(self, fabric: Fabric) -> dict[str, Any]:
        """The receipt so far, the same on all processes; all must call it.

        ``samples``, ``patches`` (several to a sample), ``voxels``; ``wall_hours`` and how much of them went to probes;
        ``cpu_hours`` of all processes and their loader workers; ``gpu_hours``: wall times devices, busy or not;
        ``peak_memory_gib`` of the largest process and ``peak_gpu_memory_gib``; ``gpu_energy_kwh`` of the devices, with
        whatever else ran on them, None where NVML does not tell; ``cpu_energy_kwh`` of the first process's processor
        packages in the same way, None where RAPL cannot be read; ``sessions``, ``processes``, ``device``, ``torch``.
        """
        wall, ranks = time.perf_counter() - self._began, fabric.world_size
        on_gpu = self.device.type == "cuda"
        energy = self._energy() - self._joule if self._energy else math.nan
        own = [self._samples, self._patches, self._voxels, (cpu_seconds() - self._cpu) / 3600, energy / 3.6e6]
        *sums, kwh = _reduced(fabric, own, "sum")
        gpu_peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else 0
        memory, gpu_memory = _reduced(fabric, [peak_memory_bytes() / 2**30, gpu_peak / 2**30], "max")
        now: dict[str, Any] = dict(zip(_SUMS, sums)) | {"wall_hours": wall / 3600, "probe_hours": self._probed / 3600}
        whole = {name: now[name] + self.before.get(name, 0) for name in (*_SUMS, *_TIMES)}
        for name in ("samples", "patches", "voxels"):
            whole[name] = round(whole[name])
        for name in ("cpu_hours", *_TIMES):
            whole[name] = round(whole[name], 6)
        gpu_hours = wall / 3600 * ranks if on_gpu else 0.0
        spent = self.before.get("gpu_energy_kwh", 0.0)
        return whole | {
            "gpu_hours": round(gpu_hours + self.before.get("gpu_hours", 0.0), 6),
            "gpu_energy_kwh": None if spent is None or math.isnan(kwh) else round(spent + kwh, 6),
            "cpu_energy_kwh": self._packages.total_kwh(self.before),
            "peak_memory_gib": round(max(memory, self.before.get("peak_memory_gib", 0.0)), 3),
            "peak_gpu_memory_gib": round(max(gpu_memory, self.before.get("peak_gpu_memory_gib", 0.0)), 3),
            "sessions": self.before.get("sessions", 0) + 1,
            "processes": ranks,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else self.device.type,
            "torch": torch.__version__,
        }


def _reduced(fabric: Fabric, values: list[float], how: str) -> list[float]:
    if fabric.world_size == 1:
        return values
    # float64: voxels pass 2^24 at once
    reduced = fabric.all_reduce(torch.tensor(values, dtype=torch.float64, device=fabric.device), reduce_op=how)
    assert isinstance(reduced, Tensor)
    return reduced.tolist()


def cpu_seconds() -> float:
    """Processor time of this process, of children that have ended and of loader workers that still run."""
    times = os.times()
    spent = times.user + times.system + times.children_user + times.children_system
    return spent + sum(_child_seconds(child.pid) for child in multiprocessing.active_children() if child.pid)


def _child_seconds(pid: int) -> float:
    """Of a running process; 0 where the system does not tell (no /proc)."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    # proc(5): utime and stime are fields 14 and 15, the name is field 2
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    try:
        # proc(5). getrusage would count the process that started this one, up to the moment it did.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): kilobytes, but bytes on macOS


def forget_peaks() -> bool:
    """The peaks of memory begin anew; whether the process's own could be told to (Linux can)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes what is held now
    except OSError:
        return False
    return True


class Packages:
    """Joules that the processor packages of this machine draw from now on (RAPL, where its files may be read).

    Source: the Linux kernel's power capping framework, Documentation/power/powercap.
    """

    def __init__(self, folder: Path = Path("/sys/class/powercap")) -> None:
        self._last, self._joule = dict[Path, int](), 0.0
        try:
            for zone in sorted(folder.glob("intel-rapl:*")):
                if zone.name.count(":") == 1:  # a package; what lies in it is counted with it
                    self._last[zone] = int((zone / "energy_uj").read_text())
        except (OSError, ValueError):
            self._last = {}

    def joule(self) -> float:
        """Since the beginning; NaN where it is not told."""
        try:
            for zone, before in self._last.items():
                now = int((zone / "energy_uj").read_text())
                room = int((zone / "max_energy_range_uj").read_text()) if now < before else 0  # it has begun anew
                self._joule += (now - before + room) / 1e6
                self._last[zone] = now
        except (OSError, ValueError):
            self._last = {}
        return self._joule if self._last else math.nan

    def total_kwh(self, before: Mapping[str, Any]) -> float | None:
        """With what earlier sessions of a run have drawn; None where any of it is not known."""
        earlier = before.get("cpu_energy_kwh", None if before else 0.0)
        kwh = self.joule() / 3.6e6
        return None if earlier is None or math.isnan(kwh) else round(earlier + kwh, 6)


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Joules that the device has drawn since its driver was loaded; None where NVML cannot tell."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:
        # Not installed, an old driver, a slice of a GPU, no permission: what the run cost is then unknown, no more.
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def describe(receipt: Mapping[str, Any]) -> str:
    """One readable line."""
    energy, packages = receipt["gpu_energy_kwh"], receipt.get("cpu_energy_kwh")
    gpu = (
        f", {receipt['gpu_hours']:.2f} GPU hours, peak {receipt['peak_gpu_memory_gib']:.1f} GiB on the GPU, "
        + ("energy unknown" if energy is None else f"{energy:.3f} kWh")
        if receipt["gpu_hours"]
        else ""
    )
    share = 100 * receipt["probe_hours"] / max(receipt["wall_hours"], 1e-9)
    return (
        f"cost: {receipt['samples']:,} samples ({receipt['patches']:,} patches, {receipt['voxels']:,} voxels), "
        f"{receipt['wall_hours']:.3f} h in {receipt['sessions']} session{'s' if receipt['sessions'] > 1 else ''} "
        f"({share:.1f} % for probes), {receipt['cpu_hours']:.3f} CPU hours, "
        f"peak {receipt['peak_memory_gib']:.1f} GiB of memory{gpu}, "
        + (f"{packages:.3f} kWh of the processor, " if packages is not None else "")
        + f"{receipt['processes']} x {receipt['device']}, "
        f"torch {receipt['torch']}"
    )
