"""``python -m dspex_kernels.cli``: for where the script is not on the path."""

from dspex_kernels.cli import main

main()
