"""The offline LM: answers any signature inside the kernel, without a network, and says that it does.

``prompts`` reads what a prompt asks for, ``samples`` makes a value of any JSON Schema, ``engines`` are the two
engines that DSPy calls.
"""
