"""A real daemon under something that listens as systemd does, and a scrape of its metrics."""

import socket

import httpx

from tests.integration.daemons import Daemon, run_cli


def test_what_systemd_hears_from_start_to_stop(tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(30)

        def heard(wanted):
            """Whatever comes up to the datagram that begins with `wanted`."""
            before = []
            for _ in range(200):
                message = manager.recv(4096).decode()
                if message.startswith(wanted):
                    return before
                before.append(message.split("\n")[0])
            raise AssertionError(before)

        daemon = Daemon(
            tmp_path / "state", "--model", "demo", NOTIFY_SOCKET=address, WATCHDOG_USEC="1000000"
        )
        try:
            # Before all else: the kernel keeps few datagrams for one who does not read.
            early = heard("READY=1")
        except (AssertionError, OSError):
            daemon.process.kill()
            raise
        with daemon:
            assert "RELOADING=1" not in early
            assert run_cli("reload", "--ctx", "4096", state_dir=tmp_path / "state").returncode == 0
            heard("RELOADING=1")
            heard("READY=1")
            heard("WATCHDOG=1")
            page = httpx.get(f"{daemon.url}/metrics").text
            assert 'kvserve_reloads_total{outcome="done",reason="context"} 1.0' in page
            assert 'n_ctx="4096"' in page
            assert run_cli("stop", state_dir=tmp_path / "state").returncode == 0
            heard("STOPPING=1")
