"""As much of systemd's manager as the driver of control groups talks to, on a private bus.

    fake_systemd.py ADDRESS LOG FOLDER     FOLDER stands for the mounted cgroup2

Every call is written to LOG, one JSON line each; "ready" is printed when the name is owned.
"""

from __future__ import annotations

import json
import os
import sys

sys.path.append("/usr/lib/python3/dist-packages")

from jeepney import (
    DBusAddress,
    HeaderFields,
    MessageType,
    new_error,
    new_method_return,
    new_signal,
)
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import Proxy, open_dbus_connection

NAME = "org.freedesktop.systemd1"
PATH = "/org/freedesktop/systemd1"


def main(address: str, log: str, folder: str) -> None:
    connection = open_dbus_connection(address)
    Proxy(message_bus, connection).RequestName(NAME)
    print("ready", flush=True)
    jobs = 0
    failed: set[str] = set()
    units: set[str] = set()
    while True:
        message = connection.receive()
        if message.header.message_type is not MessageType.method_call:
            continue
        member = message.header.fields[HeaderFields.member]
        with open(log, "a") as file:
            plain = json.dumps([member, message.body], default=list)
            file.write(f"{plain}\n")
        if member == "Get":
            wanted = message.body[1]
            value = {"Version": "v252.1-debian", "ControlGroup": "/me"}[wanted]
            connection.send(new_method_return(message, "v", (("s", value),)))
            continue
        if member not in ("StartTransientUnit", "StopUnit"):
            if member == "ResetFailedUnit":
                failed.discard(message.body[0])
            connection.send(new_method_return(message))
            continue
        name = message.body[0]
        if member == "StartTransientUnit" and name.startswith("twice") and name not in units:
            # One that is there for the first call only.
            units.add(name)
            connection.send(new_error(message, f"{NAME}.UnitExists", "s", ("it exists",)))
            continue
        if member == "StartTransientUnit":
            os.makedirs(f"{folder}/system.slice/{name}", exist_ok=True)
        jobs += 1
        job = f"{PATH}/job/{jobs}"
        connection.send(new_method_return(message, "o", (job,)))
        result = "failed" if name.startswith("broken") else "done"
        source = DBusAddress(PATH, bus_name=None, interface=f"{NAME}.Manager")
        for number, path in ((999, f"{PATH}/job/999"), (jobs, job)):
            body = (number, path, name, result)
            connection.send(new_signal(source, "JobRemoved", "uoss", body))


if __name__ == "__main__":
    main(*sys.argv[1:])
