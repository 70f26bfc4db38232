"""The service core: sessions and the kernels they live in. It knows no HTTP and never loads DSPy."""
