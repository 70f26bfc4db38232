"""What children copy lies together: code that runs, what is allocated anew, and the entries that map it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from dspex_kernels.provisioning import pages

MODULE = """
def f{n}(x):
    "{cold}"
    def inner():
        return x + {n}
    return inner()
"""
"""A function with much beside it."""


def run(code: str) -> list[str]:
    """What a program prints that has a module of many functions, ``m``."""
    program = f"""
import gc, sys, types
from dspex_kernels.provisioning import pages
m = types.ModuleType("m")
text = "".join({MODULE!r}.format(n=n, cold="cold " * 400) for n in range(400))
exec(compile(text, "m.py", "exec"), m.__dict__)
functions = [getattr(m, f"f{{n}}") for n in range(400)]
hot = functions[::10]
def pages_of(objects):
    return len({{id(each) >> 12 for each in objects}})
{textwrap.dedent(code)}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_code_that_runs_is_moved_together_and_does_what_it_did():
    before, after, alike, cold = run("""
        cold = [f.__code__ for f in functions if f not in hot]
        print(pages_of(f.__code__ for f in hot))
        inner = [c for f in hot for c in f.__code__.co_consts if isinstance(c, types.CodeType)]
        pages.gather({pages.key_of(c) for c in [*(f.__code__ for f in hot), *inner]})
        print(pages_of(f.__code__ for f in hot))
        print(all(f(1) == n + 1 for n, f in enumerate(functions)))
        print([f.__code__ for f in functions if f not in hot] == cold)
    """)
    assert int(after) < int(before) / 2
    assert (alike, cold) == ("True", "True")


def test_code_inside_other_code_is_moved_although_the_other_does_not_run():
    moved, same, works = run("""
        inner, = (c for c in m.f7.__code__.co_consts if isinstance(c, types.CodeType))
        outer = m.f7.__code__
        pages.gather({pages.key_of(inner)})
        print(m.f7.__code__ is not outer)
        print(m.f8.__code__ is m.f8.__code__ and m.f7.__code__ == outer)
        print(m.f7(1))
    """)
    assert (moved, same, works) == ("True", "True", "8")


def test_functions_that_the_collector_was_told_to_forget_are_moved_too():
    (moved,) = run("""
        gc.freeze()
        old = m.f0.__code__
        pages.gather({pages.key_of(old)})
        print(m.f0.__code__ is not old)
    """)
    assert moved == "True"


@pytest.mark.parametrize(
    ("make", "size"), [("bytes(31)", 64), ("bytes(300)", 336), ("object()", 16), ("complex(1, 2)", 32)]
)
def test_what_is_made_anew_does_not_lie_between_what_is_old(make, size):
    before, after = run(f"""
        gc.disable()
        def holes():
            many = [{make} for _ in range(20_000)]
            kept = many[::2]
            del many
            return kept
        kept = holes()
        few = [{make} for _ in range(500)]
        print(pages_of(few))
        del few
        pages.fill_gaps()
        few = [{make} for _ in range(500)]
        print(pages_of(few))
    """)
    # Beside what they fill: a page that was begun, and what Python 3.13 leaves between.
    assert int(after) <= 500 * size // 4096 + 8, f"{before} before"
    assert int(after) < int(before)


def test_memory_that_is_joined_holds_what_it_held_and_a_child_copies_what_it_changes():
    same, changed = run("""
        import os
        held = [bytes([n % 251]) * 3000 for n in range(10_000)]
        pages.join()
        print(all(each == bytes([n % 251]) * 3000 for n, each in enumerate(held)))
        array = bytearray(8 << 20)
        pages.join()
        pid = os.fork()
        if not pid:
            array[:] = b"x" * len(array)
            os._exit(0)
        os.waitpid(pid, 0)
        print(any(array))
    """)
    assert (same, changed) == ("True", "False")


def test_memory_that_fills_huge_pages_has_them_where_the_system_can():
    told = run("""
        import ctypes, mmap
        def huge():
            text = open("/proc/self/smaps_rollup").read()
            return int(text.split("AnonHugePages:")[1].split()[0])
        can = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        can[:] = b"x" * len(can)
        address = -(-ctypes.addressof(ctypes.c_char.from_buffer(can)) // pages.HUGE) * pages.HUGE
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        could = libc.madvise(address, pages.HUGE, pages.MADV_COLLAPSE) == 0
        held = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        where = ctypes.addressof(ctypes.c_char.from_buffer(held))
        libc.madvise(where, len(held), 15)  # MADV_NOHUGEPAGE: not before they are asked for, whatever the setting
        held[:] = b"x" * len(held)
        libc.madvise(where, len(held), 14)  # MADV_HUGEPAGE: from now on
        before = huge()
        pages.join()
        print(could, huge() - before)
    """)
    could, more = told
    never = "[never]" in pages.SETTING.read_text() if pages.SETTING.exists() else True
    assert (could == "True" and not never) == (int(more) >= 2 << 10)


@pytest.mark.parametrize("allocator", ["malloc", "debug"])
def test_another_allocator_of_small_objects_is_left_alone(monkeypatch, allocator):
    monkeypatch.setenv("PYTHONMALLOC", allocator)
    assert run("pages.fill_gaps(); print(len(pages._fillings))") == ["0"]
