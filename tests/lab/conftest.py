"""The beds of tests/oci, for cases.py."""

from __future__ import annotations

from tests.oci.conftest import bed, bundle, pytest_generate_tests, runtime

__all__ = ["bed", "bundle", "pytest_generate_tests", "runtime"]
