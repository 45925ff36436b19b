"""The command line of the `oci` engine: runc's, and Apptainer's own `oci` commands."""
