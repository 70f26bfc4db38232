"""Language models of sessions: profiles become LMs, and every request passes one gate.

``profiles`` builds an LM from its profile, ``gate`` is what all requests pass, ``cache`` and ``history`` give each
session its own where DSPy has one for the process. The offline LM is a package beside this one.
"""
