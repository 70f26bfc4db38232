"""`dspex-kernels bench`: what kernels and sessions cost on this machine, side by side in one run.

``app`` is the subcommand. One module a measurement (``starts``, ``memory``, ``crowd``, ``round_trip``,
``throughput``, ``backends``, ``refill``), each a ``Measurement`` that gives rows. ``ways`` are the ways of starting
a session that they compare, ``stock`` is Jupyter's own kernel, ``in_process`` asks DSPy in a process of its own
(``baseline`` runs there): this process never imports it. ``figures`` makes medians, spread and ratios of samples;
``report`` shows them, ``plots`` draws them.

What is compared takes turns (ABC, ABC, …), so that a machine that slows down slows all of it down.
"""
