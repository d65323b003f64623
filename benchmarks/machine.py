"""What a result was measured on: GPU, driver, versions, date, commit."""

from __future__ import annotations

import datetime
import platform
import subprocess

import jax
import jaxlib


def describe_machine() -> dict[str, str]:
    """Names and versions; "unknown" where the machine does not tell."""
    device = jax.devices()[0]
    smi = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    name, _, driver = (smi[0] if smi else "").partition(", ")
    return {
        "device": name or device.device_kind,
        "backend": jax.default_backend(),
        "driver": driver or "unknown",
        "platform_version": " ".join(str(getattr(device.client, "platform_version", "unknown")).split()),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _output("git", "describe", "--always", "--dirty") or "unknown",
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
