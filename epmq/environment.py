"""What is installed and what is used, for ``epmq env`` and bug reports."""

from __future__ import annotations

import importlib.metadata

from epmq import __version__, extension, onednn, ops
from epmq.report import machine

OPTIONAL = ("transformers", "triton", "scikit-learn", "matplotlib")


def describe() -> list[str]:
    """Lines of ``name: value``."""
    lines = [f"epmq: {__version__}"]
    lines += [f"{key}: {value}" for key, value in machine().items()]
    for package in OPTIONAL:
        try:
            lines.append(f"{package}: {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package}: absent")
    built = extension.build_report()
    lines += [f"extension {key}: {value}" for key, value in built.items()] or ["extension: absent"]
    lines.append(f"fp32 linears of forward passes: {'oneDNN' if onednn.preferred() else 'torch'}")
    lines.append(f"EPMQ_BACKEND: {ops.wanted_backend() or 'not set'}")
    for op in ops.operations():
        forms = [form.backend for form in ops.implementations(op)]
        lines.append(f"{op}: {forms[0]} preferred, registered: {', '.join(forms)}")
    return lines
