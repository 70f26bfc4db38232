"""A module that can be forked, and started plainly: its kernel runs the Python code of its "connection file"."""
