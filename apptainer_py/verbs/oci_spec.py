"""`spec`: a config.json to begin with, the one that runc writes."""

from __future__ import annotations

import os

from apptainer_py.base.files import write_all
from apptainer_py.engines.oci.base_spec import specification
from apptainer_py.runtime.containers import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.model.oci_call import OciCall


def _rootless(config: dict[str, Any]) -> None:
    """Change it into one that an ordinary user can run: own ids, the host's network."""
    linux = config["linux"]
    kept = [row for row in linux["namespaces"] if row["type"] != "network"]
    linux["namespaces"] = [*kept, {"type": "user"}]
    linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    linux.pop("resources", None)
    for mount in config["mounts"]:
        if mount["destination"] == "/sys":
            mount["type"], mount["source"] = "none", "/sys"
            mount["options"] = ["rbind", *mount["options"]]
        # The one group that is mapped is no tty's.
        mount["options"] = [word for word in mount.get("options", ()) if word[:4] != "gid="]


def spec(call: OciCall, environment: Mapping[str, str]) -> str:
    """Write config.json into the bundle.

    Raises:
        ContainerError: there is one, or it cannot be written.
    """
    import json

    config = specification()
    if call.flag("rootless"):
        _rootless(config)
    if call.text("bundle"):
        os.chdir(call.text("bundle"))
    if os.path.lexists("config.json"):
        raise ContainerError(text="File config.json exists. Remove it first")
    data = json.dumps(config, indent="\t").encode() + b"\n"
    try:
        write_all(os.open("config.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), data)
    except OSError as error:
        text = f"open config.json: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    return ""
