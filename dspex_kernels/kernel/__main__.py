"""``python -m dspex_kernels.kernel -f CONNECTION_FILE``: start a kernel."""

from __future__ import annotations

import os
import sys

# jsonschema compiles a grammar for IRI formats at its import when this package is there (jupyter_server brings
# it): one second of each kernel's start, and nothing in a kernel checks IRIs. jsonschema guards the import.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # None is "not importable"
# DSPy and litellm fetch price lists over the network on first use otherwise.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

if __name__ == "__main__":
    from dspex_kernels.kernel.app import DSPexKernelApp

    DSPexKernelApp.launch_instance()
