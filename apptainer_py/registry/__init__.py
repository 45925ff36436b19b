"""Registries of the OCI distribution specification: names, accounts, and the HTTP they speak."""

from __future__ import annotations

from apptainer_py.base import packages

packages.allow()
