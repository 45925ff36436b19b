"""Where a runtime does not do what a test asks, and why; each is expected to fail strictly."""

from __future__ import annotations

# Runtime → test (without its parameter for the runtime) → reason.
DIFFERENCES: dict[str, dict[str, str]] = {
    "runc": {
        **{
            f"test_a_version_that_is_none[{version}]": "it does not look at ociVersion"
            for version in ("", "one", "1", "v1.0.0")
        },
        "test_a_descriptor_to_preserve_that_is_not_there": "it leaves the state directory behind",
    },
    "ours": {},
}
