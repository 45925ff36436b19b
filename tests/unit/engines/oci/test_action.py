"""`--oci` heeds each option, or refuses it."""

from __future__ import annotations

import pytest

from apptainer_py.engines.oci import image_spec
from apptainer_py.model.request import ActionRequest, Invocation

HEEDED = """
image arguments instance add_caps apply_cgroups bind blkio_weight blkio_weight_device cleanenv
cpu_shares cpus cpuset_cpus cpuset_mems cwd dns drop_caps env env_file hostname memory
memory_reservation memory_swap mount net network no_env no_eval no_privs oci oom_kill_disable
pids_limit scratch shell
""".split()
# What every container of the engine is: of its own in all of it, with the image's own programs.
ANYWAY = """
compat contain containall ipc no_home no_init no_umask pid userns uts writable_tmpfs
""".split()
# They only take back what is refused, or belong to instances.
WITHOUT_MEANING = "no_nv no_rocm pid_file".split()


def test_no_option_is_forgotten() -> None:
    known = {*HEEDED, *ANYWAY, *WITHOUT_MEANING, *image_spec._REFUSED}
    assert set(ActionRequest._fields) - set(Invocation._fields) | {"image"} == known


@pytest.mark.parametrize("field", image_spec._REFUSED)
def test_each_is_refused_by_its_name(field: str) -> None:
    action = ActionRequest(command="run", image="x", **{field: True})
    with pytest.raises(image_spec.NotWithOci) as caught:
        image_spec.check_action(action, rootless=False)
    assert f"--{field.replace('_', '-')}`" in str(caught.value)
