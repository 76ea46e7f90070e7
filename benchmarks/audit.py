"""Known vulnerabilities of the locked packages: ``make audit``. Runs in an environment that has pip-audit and nothing of ours.

Exit status 0: every package was looked up and nothing is known; 1: vulnerabilities, listed; 3: some could not be looked up,
as without a network, so that nothing can be said about them.
"""

from __future__ import annotations

import json
import subprocess
import sys

CLEAN, VULNERABLE, NOT_AUDITED = 0, 1, 3
OPTIONS = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]


def audit(lock: str) -> int:
    """The exit status; what was found is printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--requirement", lock, *OPTIONS], capture_output=True, text=True
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["pip-audit is not installed"])[-1]
        print(f"audit: NOT AUDITED, nothing can be said: {reason}")
        return NOT_AUDITED
    return report(packages)


def report(packages: list[dict]) -> int:
    """Print what pip-audit knows of each package; returns the exit status."""
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [(package, hole) for package in packages for hole in package.get("vulns", ())]
    for package, hole in found:
        fixed = ", ".join(hole.get("fix_versions", ())) or "no release"
        print(f"audit: {package['name']} {package['version']}: {hole['id']}, fixed in {fixed}")
    print(f"audit: {len(packages) - len(skipped)} packages looked up, {len(found)} known vulnerabilities")
    if skipped:
        print(f"audit: NOT AUDITED: {len(skipped)} could not be looked up (no network?): {', '.join(skipped[:8])} ...")
    return VULNERABLE if found else NOT_AUDITED if skipped or not packages else CLEAN


if __name__ == "__main__":
    sys.exit(audit(sys.argv[1] if len(sys.argv) > 1 else "requirements.lock"))
