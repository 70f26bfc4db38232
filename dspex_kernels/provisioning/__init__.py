"""How a kernel process is born, and how it ends with its service, however that ends.

Each process that owns kernels has a *guardian* (``guardian``): a small process that is the parent of all of them
and the reaper of their orphans. It ends what is below it when its service is gone. ``guardian_client`` is the
service's side of it, ``guardians`` finds the one for a kernel, ``provisioner`` puts it behind Jupyter's own
interface, ``sweep`` clears away what is left where the guardian was killed together with its service.

Kernels are there at once because they are forked: from a process that has imported everything (``forkserver``), as
one of those that stand by where there is one (``fork_servers``), behind Jupyter's interface too
(``fork_provisioner``).
"""
