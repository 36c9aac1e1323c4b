"""Reads the facts off this machine; whatever cannot be read is a fact too, never an exception."""

import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Mapping

from kvserve.device.cgroup import read_limits
from kvserve.device.hardware import count_nvidia_cards, process_name, read_processor
from kvserve.device.host import read_host, read_kernel
from kvserve.device.nvml import processes, report_gpus
from kvserve.doctor.facts import Driver, Facts, GpuUser, Kernel, Library, Model, Port
from kvserve.errors import KvserveError, WorkerFailed
from kvserve.instance import make_state_dir, running_instances
from kvserve.settings import Settings, environment_warnings
from kvserve.supervisor.building import ask_build

_NVCC = "/usr/local/cuda/bin/nvcc"


def examine(settings: Settings, model: Model | None, environ: Mapping[str, str]) -> Facts:
    """Look at everything. Takes a second or two: llama.cpp is loaded in a process of its own,
    with the GPUs hidden, so that it takes none of their memory."""
    return Facts(
        python=sys.executable,
        nvcc=shutil.which("nvcc") or shutil.which(_NVCC),
        driver=_driver(environ),
        n_cards=count_nvidia_cards(),
        library=_library(),
        processor=read_processor(),
        host=read_host(),
        n_host_bytes=read_kernel().total_bytes,
        limits=read_limits(),
        port=_port(settings),
        kernel=_kernel(),
        model=model,
        state_dir_error=_complaint(lambda: make_state_dir(settings.state_dir)),
        exposure_error=_complaint(settings.check_exposure),
        unknown_variables=environment_warnings(environ),
    )


def _driver(environ: Mapping[str, str]) -> Driver:
    seen = report_gpus(environ=environ)
    shown = {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    every = report_gpus(environ=shown)
    uuids = {gpu.uuid for gpu in seen.gpus}
    return Driver(
        version=seen.driver_version,
        gpus=seen.gpus,
        hidden=tuple(gpu for gpu in every.gpus if gpu.uuid not in uuids),
        reason=seen.reason,
        notes=seen.notes,
        users=tuple(
            GpuUser(gpu.uuid, pid, process_name(pid), n_bytes)
            for gpu in seen.gpus
            for pid, n_bytes in processes(gpu.uuid)
        ),
    )


def _library() -> Library:
    try:
        version, system_info = ask_build()
    except WorkerFailed as error:
        return Library(None, error=error.message)
    return Library(version, system_info)


def _port(settings: Settings) -> Port:
    error = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen()
    except OSError as failure:
        error = failure.strerror or str(failure)
    running = running_instances(settings.state_dir) if error else []
    owners = [instance.model for instance in running if instance.port == settings.port]
    return Port(settings.host, settings.port, error, owners[0] if owners else None)


def _kernel() -> Kernel:
    error = None
    try:
        os.close(os.memfd_create("kvserve-doctor", os.MFD_CLOEXEC))
    except OSError as failure:
        error = failure.strerror or str(failure)
    return Kernel(error, n_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _complaint(check: Callable[[], None]) -> str | None:
    try:
        check()
    except KvserveError as error:
        return error.message
    return None
