"""What runs inside a kernel process: the IPython kernel that also answers commands.

A package of its own with few imports at its top: it is loaded in every kernel, and a kernel's start is what a
person waits for. It knows the protocol and nothing of the service.
"""
