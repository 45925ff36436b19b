"""Where a runtime does not do what a test asks, and why; each is expected to fail strictly."""

from __future__ import annotations

LATER = "it ignores the key, which later versions know"
# Runtime → test (without its parameter for the runtime) → reason.
DIFFERENCES: dict[str, dict[str, str]] = {
    "runc": {
        **{
            f"test_a_version_that_is_none[{version}]": "it does not look at ociVersion"
            for version in ("", "one", "1", "v1.0.0")
        },
        "test_a_descriptor_to_preserve_that_is_not_there": "it leaves the state directory behind",
        "test_a_user_that_is_no_number[99999999999]": "it takes the low 32 bits",
        "test_umask_of_a_process_file": LATER,
        "test_poststart_hooks_run_at_start": "it runs them in create",
        "test_a_poststart_hook_that_fails": "it runs them in create",
        "test_a_poststop_hook_that_fails": "it leaves the rest out",
        "test_a_failure_before_the_interpreter_is_logged": "it has no such limit",
        **{
            f"test_exec_wait_fifo{name}": "a later version has the flag"
            for name in ("", "_that_is_none[a file]", "_that_is_none[nothing]")
        },
        "test_cgroup_manager_disabled": "the flag is one of crun's",
        "test_maps_without_a_user_namespace": "it ignores them; later versions refuse them",
        "test_a_path_that_is_relative[maskedPaths]": "it takes the path from its own directory",
        "test_a_path_that_is_relative[readonlyPaths]": "it takes the path from its own directory",
        **{
            f"test_memory_policy[{name}]": LATER
            for name in ("bind", "interleave", "preferred", "local")
        },
        **{f"test_a_wrong_memory_policy[{name}]": LATER for name in ("mode", "none", "too many")},
        "test_a_network_device": LATER,
        "test_a_network_device_that_is_not_there": LATER,
        "test_a_network_device_without_a_namespace": LATER,
    },
    "ours": {
        "test_root_is_not_a_link": "it is refused, in other words than runc's",
        "test_a_flag_of_a_file_system[iversion]": "fsconfig(2) knows no such flag on tmpfs",
    },
}
