"""The other rows of the requirements on security, each with the test that proves it, or a reason.

Holes of container tools by number are in `test_b3.py`, `test_b8.py` and `oci/test_rows.py`, whose
tests carry their rows in their names; a row here is proved by a test that has another subject too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
_REPLAY = "test_interpreter.py::test_no_interpreter_with_privilege_over_the_functional_suite"
PROVED = {
    # The audit record.
    "A01": "e2e/test_audit.py::test_one_record_for_each_launch",
    "A02": "e2e/test_audit.py::test_a_name_forges_nothing",
    "A04": "e2e/test_audit.py::test_refused_callers_are_recorded",
    "A05": "e2e/test_audit.py::test_full_sink",
    # Engines and runtimes: what reaches the payload.
    "E01": "e2e/test_cve.py::test_groups_stay_in_a_users_namespace",
    "E02": "security/test_sharing.py::test_another_user_listens",
    "E03": "e2e/test_cve.py::test_account_files_of_the_image_are_read_within_bounds",
    "E04": "e2e/test_cve.py::test_home_adds_no_line_to_passwd",
    "E05": "security/test_ecl.py::test_nobody_speaks_for_the_program_that_verifies",
    # libc, and the caller's state.
    "G01": "e2e/test_cve.py::test_loader_settings_of_the_caller_change_nothing",
    "G02": "security/test_forged_caller.py::test_odd_arguments_are_refused_in_one_line",
    "G03": "security/test_forged_caller.py::test_each_limit_is_bearable_or_refused",
    "G04": "security/test_forged_caller.py::test_a_directory_that_is_not_there",
    # The kernel's mounts.
    "K01": "e2e/test_cve.py::test_every_mount_is_without_setuid_and_devices",
    "K02": "starter/test_init_mounts.py::test_locked_flags",
    "K03": "security/test_overlay_layers.py::test_nothing_beneath_a_mount_is_uncovered",
    "K05": "e2e/test_install.py::test_every_program_has_its_mode",
    # The setuid program.
    "L01": "house/test_programs.py::test_needs_libc_and_nothing_else",
    "L02": "starter/test_launcher.py::test_what_makes_the_bit_useless",
    "L04": "security/test_forged_caller.py::test_only_a_sealed_memory_file_is_a_request",
    "L05": "security/test_forged_caller.py::test_each_limit_is_bearable_or_refused",
    "L06": "security/test_forged_caller.py::test_timers_of_the_caller_do_not_end_the_launch",
    "L07": "e2e/test_kill_steps.py::test_killed_at_a_step",
    "L09": "starter/test_config.py::test_links_are_not_followed",
    "L12": "e2e/test_identity.py::test_every_process_has_the_identity_of_the_table",
    "L13": "e2e/test_identity.py::test_no_process_holds_privilege_while_the_payload_sleeps",
    "L15": "starter/test_launcher.py::test_what_makes_the_bit_useless",
    # Setuid mounters and helpers for ids.
    "M01": f"security/{_REPLAY}",
    "M03": "security/test_races.py::test_swapped",
    "M04": "e2e/test_cve.py::test_what_the_user_cannot_read_cannot_be_bound",
    "M05": "e2e/test_cve.py::test_payload_holds_no_descriptor_of_ours",
    "M06": "e2e/test_cve.py::test_every_mount_is_without_setuid_and_devices",
    "M07": "security/test_subids.py::test_ids_of_others_are_not_mapped",
    "M08": "e2e/test_install.py::test_everything_is_roots_alone",
    "M09": "security/test_instances.py::test_s04_no_record_leads_into_another_namespace",
    "M10": "e2e/test_policy.py::test_namespaces_that_may_be_joined",
    "M11": "security/test_forged_caller.py::test_parts_that_lie_are_refused",
    "M12": "security/test_forged_caller.py::test_odd_arguments_are_refused_in_one_line",
    "M13": "house/test_programs.py::test_needs_libc_and_nothing_else",
    # Python never has privilege.
    "P01": "house/test_programs.py::test_needs_libc_and_nothing_else",
    "P02": f"security/{_REPLAY}",
    "P04": "e2e/test_identity.py::test_every_hook_runs_as_its_stage",
    "P05": "security/test_forged_caller.py"
    "::test_a_poisoned_environment_and_directory_change_nothing",
    "P06": "e2e/test_leftovers.py::test_normal_end_with_everything",
    "P07": "security/test_forged_caller.py::test_signals_reach_the_payload_as_they_were",
    "P08": "e2e/test_encrypted.py::test_the_secret_is_in_no_command_line_environment_or_trace",
    "P09": "security/test_numbered_rows.py::test_an_assert_decides_nothing",
    "P10": "house/test_checkers.py::test_lint",
    "P12": "e2e/test_cve.py::test_root_in_a_users_directory_runs_nothing_of_it",
    # bubblewrap, flatpak, snap.
    "W01": "security/test_access.py::test_no_process_before_the_payload_can_be_got_at",
    "W02": "security/test_sockets.py::test_hostile_frames_end_the_launch",
    "W04": "e2e/test_install.py::test_everything_is_roots_alone",
    "W05": "e2e/test_identity.py::test_every_process_has_the_identity_of_the_table",
    "W06": "e2e/test_cve.py::test_links_in_the_image_lead_nowhere_on_the_host",
    "W07": "e2e/test_cve.py::test_words_that_look_like_options_stay_words",
    "W08": "e2e/test_image_server_filter.py::test_a_forbidden_call_is_its_end",
    "X01": "security/oci/test_rootless.py::test_x01_locked_mounts_stay_locked",
}
ABSENT = {
    "A03": "every launch is recorded; how many a second is for the sink to bear",
    "H01": "charliecloud's own suite needs its images; what it asks is asked in tests/e2e",
    "K04": "/proc is mounted by the kernel for a user without rights; hidepid is the host's",
    "L16": "no profile of AppArmor or SELinux is shipped for the starter",
    "M02": "no privileged operation takes the options of a mount as text",
    "P03": "P02 follows every execve, and needs no tracer in the kernel",
    "P11": "warnings of the interpreter are for tests, which make errors of them",
    "W03": "the terminal is the user's own, and shared as with Apptainer",
}
COUNTS = {"A": 5, "E": 5, "G": 4, "H": 1, "K": 5, "L": 16, "M": 13, "P": 12, "W": 8, "X": 1}
# Numbers of part C that are advice on how to write the starter, and name no test.
UNNUMBERED = {"L03", "L08", "L10", "L11", "L14"}


def test_every_row_has_a_test_or_a_reason():
    rows = {f"{part}{number:02}" for part, last in COUNTS.items() for number in range(1, last + 1)}
    assert not set(PROVED) & set(ABSENT)
    assert set(PROVED) | set(ABSENT) == rows - UNNUMBERED


@pytest.mark.parametrize("row", list(PROVED))
def test_the_test_of_a_row_is_there(row):
    file, _, name = PROVED[row].partition("::")
    assert f"def {name}(" in (TESTS / file).read_text()


def test_an_assert_decides_nothing():
    """Each tells a type checker what is so, and could be left out, as `python -O` does."""
    others = []
    for path in (TESTS.parent / "apptainer_py").rglob("*.py"):
        tests = [n.test for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        others += [f"{path}:{test.lineno}" for test in tests if not narrows(test)]
    assert others == []


def narrows(test: ast.expr) -> bool:
    """Return whether an expression is a type's question: a name, a kind, something or nothing."""
    if isinstance(test, ast.BoolOp):
        return all(narrows(part) for part in test.values)
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot | ast.Is)
    if isinstance(test, ast.Call):
        return isinstance(test.func, ast.Name) and test.func.id in ("isinstance", "callable")
    return isinstance(test, ast.Name)
