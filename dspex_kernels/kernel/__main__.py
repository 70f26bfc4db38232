"""``python -m dspex_kernels.kernel -f CONNECTION_FILE``: start a kernel."""

from __future__ import annotations

if __name__ == "__main__":
    from dspex_kernels.kernel.template import prepare

    prepare()
    from dspex_kernels.kernel.app import DSPexKernelApp

    DSPexKernelApp.launch_instance()
