"""Programs from data: what a client describes becomes a DSPy module, and a record builds it again.

From the bottom: ``types`` and ``json_schemas`` (a client's types; nothing is evaluated or imported),
``signatures``, ``values`` (results as JSON), ``tools``, ``rewards``, ``modules``, ``live`` (the
program that runs), ``streaming``.
"""
