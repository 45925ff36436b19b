"""Registries of the OCI distribution specification: names, accounts, and the HTTP they speak."""

from apptainer_py.base import packages

packages.allow()
