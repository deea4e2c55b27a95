"""The reason for a failure of pip, from what it printed."""

import re

# What pip prints, and the correction; the first that matches counts.
PIP_FAILURES = (
    (
        r"DO NOT MATCH THE HASHES",
        "a downloaded file does not have the pinned hash; check pip's index settings, and try again",
    ),
    (r"No space left on device", "the disk is full; free about 10 GB, and try again"),
    (
        r"NewConnectionError|NameResolutionError|Connect(ion)?Timeout|ReadTimeout|Read timed out|ProxyError"
        r"|SSLError|Temporary failure in name resolution|Network is unreachable|from versions: none",
        "the package index could not be reached or lacks a package; check the network and pip's index "
        "settings, and try again",
    ),
    (
        r"No matching distribution found|ResolutionImpossible",
        "no package index in pip's settings offers matching versions for this Python; name one that does in "
        "PIP_EXTRA_INDEX_URL, and check pip's constraints",
    ),
)


def explain_pip(output: str) -> str:
    """Return why pip failed and the correction, as half a sentence, from all that it printed."""
    for pattern, reason in PIP_FAILURES:
        if re.search(pattern, output):
            return reason
    lines = [line for line in output.splitlines() if line.strip()] or ["nothing"]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return f"the last line of pip's output is: {errors[-1].strip()}"
