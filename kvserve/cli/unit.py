"""The systemd unit: for the machine, in a sandbox, or for one user."""

import shlex

_HEAD = """\
# Written by `kvserve service install`; `kvserve service uninstall` takes it away.
[Unit]
Description=kvserve, a llama.cpp server
{after}
[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
# The daemon ends its workers itself, after running requests.
KillMode=mixed
TimeoutStopSec=20
# A large model loads for minutes; load_timeout ends a load that hangs.
TimeoutStartSec=infinity
WatchdogSec=30
Restart=on-failure
RestartSec=5
# Starting again mends neither wrong settings (2), nor a model that does not fit (3), nor one that
# cannot be loaded (4): the daemon has tried all that may help itself. Once it serves, it outlives
# its workers and tries anew each minute.
RestartPreventExitStatus=2 3 4
UMask=0077
LimitNOFILE=65536
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
"""

_SANDBOX = """\
# A user of its own, which exists while the service runs; its state is /var/lib/kvserve.
DynamicUser=yes
StateDirectory=kvserve
StateDirectoryMode=0700
Environment=KVSERVE_STATE_DIR=/var/lib/kvserve HOME=/var/lib/kvserve
# KVSERVE_API_KEY=… and the like; readable by root alone.
EnvironmentFile=-/etc/kvserve/environment
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateMounts=yes
# The cards, and no other device.
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
ProtectProc=invisible
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
"""

_FOOT = """
[Install]
WantedBy={target}
"""


def unit_text(command: list[str], *, user: bool) -> str:
    """The unit that runs `command`. A user's service manager cannot set most of the sandbox."""
    after = "" if user else "After=network-online.target\nWants=network-online.target\n"
    # systemd reads % and $ in a command.
    line = shlex.join(command).replace("%", "%%").replace("$", "$$")
    text = _HEAD.format(after=after, command=line)
    if not user:
        text += _SANDBOX
    return text + _FOOT.format(target="default.target" if user else "multi-user.target")
