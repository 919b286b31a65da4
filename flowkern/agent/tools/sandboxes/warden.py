"""The process between a run and a program in a sandbox. Started as a script, on its own:

    python -I -S warden.py sandlock|wasm|compile '{"parent": PID, ...}' < PROGRAM > OUTPUT

It gives up what it does not need (capabilities, its parent's life, memory, files), starts the
program and ends with its status: 128 + a signal's number, TIME_OVER, TRAPPED, or NOT_STARTED with
the reason as the output. It imports nothing of flowkern: what is here is all that a program could
ever see.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import resource
import signal
import struct
import sys

TIME_OVER, TRAPPED, NOT_STARTED = 124, 98, 97
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 22, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
MEBIBYTE = 2**20

# Runs the program that comes by standard input, and shows the value of its last expression, as an
# interactive Python does. Its arguments are directories to import from.
GUEST = """
import ast, os, sys

def main():
    if sys.platform != "wasi":
        os.dup2(1, 2)  # it was started without, as sandlock writes there too
    sys.path.extend(sys.argv[1:])
    program, scope = sys.stdin.read(), {"__name__": "__main__"}
    try:
        tree = ast.parse(program, "<program>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<program>", "exec"), scope)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<program>", "eval"), scope)
            if value is not None:
                print(repr(value))
    except SystemExit:
        raise
    except BaseException as error:
        import traceback
        frame = error.__traceback__
        while frame is not None and frame.tb_frame.f_code.co_filename != "<program>":
            frame = frame.tb_next  # what is ours
        traceback.print_exception(error.with_traceback(frame))
        sys.exit(1)

main()
"""
# No site, nothing of the working directory, no bytecode, unbuffered; strings hash the same always.
FLAGS = ["-s", "-S", "-P", "-B", "-u", "-X", "utf8"]
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}

# Landlock holds files and sandlock's own list the rest of the kernel that is dangerous. These are
# what both leave to a process of the same user, and Python does without: other processes' limits,
# priorities and signals; times, owners and attributes of files that it may not open; memory files;
# and to take back the promise to die with its parent.
DENIED = """
    prlimit64 sched_setaffinity sched_setscheduler sched_setparam sched_setattr setpriority
    ioprio_set move_pages migrate_pages pidfd_open pidfd_send_signal pidfd_getfd process_madvise
    process_mrelease process_vm_readv process_vm_writev kcmp ptrace tkill
    rt_sigqueueinfo rt_tgsigqueueinfo prctl
    fchmod fchmodat fchmodat2 fchown fchownat utimensat
    setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr setxattrat removexattrat
    getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr getxattrat listxattrat
    setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset
    memfd_create memfd_secret inotify_init1 inotify_add_watch fanotify_init
    listen accept accept4 mq_open mq_unlink shmget
    mknodat linkat symlinkat renameat renameat2 unlinkat mkdirat truncate
    chroot name_to_handle_at syslog personality
    io_uring_setup userfaultfd landlock_create_ruleset seccomp quotactl sync syncfs flock
""".split()
# Calls that only older machines have, each beside its successor above.
if os.uname().machine == "x86_64":
    DENIED += """
        chmod chown lchown utime utimes futimesat inotify_init
        mknod link symlink rename unlink mkdir rmdir creat
    """.split()
# What the warden forbids itself, and so what it starts, beside that: sandlock keeps `socket` to
# itself and lets local and netlink ones be made; `ioctl` changes the flags of a file that is only
# read, and makes it unchangeable for ever (verity); `fcntl` takes leases and locks, for which other
# processes wait, and watches directories. Machine -> its number for seccomp, and those of socket,
# socketpair, ioctl and fcntl.
CALLS = {"x86_64": (0xC000003E, 41, 53, 16, 72), "aarch64": (0xC00000B7, 198, 199, 29, 25)}
# Of terminals (what they are, their size), of descriptors (bytes to read, inherited, blocking), and
# of seccomp, by which sandlock itself hears of a program's calls.
IOCTLS = [0x5401, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421]
IOCTLS += [0xC0502100, 0xC0182101, 0x40082102, 0x40182103, 0x40082104]
FCNTLS = [0, 1, 2, 3, 4, 1027, 1030, 1031, 1032]  # copies and flags of descriptors, sizes of pipes
FIRST_UNKNOWN = 457  # calls of Linux 6.8 and later, on every machine, mounts and attributes first


def main() -> int:
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    sys.path += settings["imports"]  # after the standard library
    try:
        renounce(settings["parent"])
        if kind == "compile":
            return compile_module(settings)
        limit(settings)
        forbid_calls()
        return {"sandlock": in_sandlock, "wasm": in_wasm}[kind](settings)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return NOT_STARTED


def renounce(parent: int) -> None:
    """Die with the parent, gain nothing by starting programs, and have no capability."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise RuntimeError("the parent has ended")
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    libc.prctl(PR_CAP_AMBIENT, 4, 0, 0, 0)  # all of them
    for capability in range(64):  # fails past the last, and for whoever has none
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    os.umask(0o077)


def forbid_calls() -> None:
    """A filter of system calls: no socket of any kind, no ioctl and fcntl but those above, none of
    another machine's numbers, where the rest would have others, and none that nobody here knows."""
    machine = os.uname().machine
    if machine not in CALLS:
        raise RuntimeError(f"no system call numbers are known for {machine}")
    number, socket, pair, ioctl, fcntl = CALLS[machine]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # instructions of BPF
    of_machine, of_call, of_command = (load, 0, 0, 4), (load, 0, 0, 0), (load, 0, 0, 24)
    allow = (answer, 0, 0, 0x7FFF0000)
    refuse, unknown = ((answer, 0, 0, 0x00050000 | why) for why in (errno.EPERM, errno.ENOSYS))
    # A test skips so many instructions where it holds, and so many where it does not.
    code = [of_machine, (equal, 1, 0, number), refuse, of_call]
    code += [(at_least, 0, 1, 0x40000000), refuse]  # of x32
    code += [(at_least, 0, 1, FIRST_UNKNOWN), unknown]
    for call in (socket, pair):
        code += [(equal, 0, 1, call), refuse]
    for call, commands in ((ioctl, IOCTLS), (fcntl, FCNTLS)):
        known = [step for one in commands for step in ((equal, 0, 1, one), allow)]
        code += [(equal, 0, len(known) + 2, call), of_command, *known, refuse]
    code += [allow]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(code), ctypes.addressof(packed))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


def limit(settings: dict) -> None:
    """What the kernel holds the warden to, and what it starts."""
    seconds = math.ceil(settings["seconds"]) + 1
    for what, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def in_sandlock(settings: dict) -> int:
    from sandlock import ExitReason, Sandbox, StdioMode

    memory = settings["memory"] * MEBIBYTE
    sandbox = Sandbox(
        fs_readable=settings["readable"],
        extra_deny_syscalls=DENIED,
        clean_env=True,
        env=ENVIRONMENT,
        max_memory=memory,
        max_processes=1,
        no_coredump=True,
        cwd="/",
    )
    program = sys.stdin.buffer.read()
    command = [settings["python"], *FLAGS, "-c", GUEST, *settings["packages"]]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    process = sandbox.popen(command, StdioMode.PIPED, StdioMode.INHERIT, StdioMode.INHERIT)
    # It waits for the program to run, so that this limit is there before.
    resource.prlimit(process.pid, resource.RLIMIT_AS, (memory, memory))
    with contextlib.suppress(OSError):  # it has ended
        process.stdin.write(program)
    result = process.wait(timeout=settings["seconds"])
    if result.reason == ExitReason.TIMEOUT:
        return TIME_OVER
    if result.signal and result.signal > 0:
        return 128 + result.signal
    return result.exit_code if result.reason == ExitReason.EXITED else 128 + signal.SIGKILL


def in_wasm(settings: dict) -> int:
    import wasmtime

    engine = wasmtime.Engine()
    module = wasmtime.Module.deserialize_file(engine, settings["module"])
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    store = wasmtime.Store(engine)
    store.set_limits(memory_size=settings["memory"] * MEBIBYTE, memories=1, instances=1)
    wasi = wasmtime.WasiConfig()  # no file, no directory, no socket: three streams
    wasi.argv = ["python", *FLAGS, "-c", GUEST]
    wasi.env = ENVIRONMENT.items()
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    store.set_wasi(wasi)
    # Ends this process, whatever the module does: a sleeping one is not within WebAssembly.
    signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
    try:
        linker.instantiate(store, module).exports(store)["_start"](store)
    except wasmtime.ExitTrap as end:
        return end.code
    except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
        print(str(error).splitlines()[-1].strip(), flush=True)
        return TRAPPED
    return 0


def compile_module(settings: dict) -> int:
    """Machine code of a WebAssembly module, which takes seconds, into a file of its own."""
    import wasmtime

    module = wasmtime.Module.from_file(wasmtime.Engine(), settings["wasm"])
    with open(settings["module"], "wb") as file:
        file.write(module.serialize())
    return 0


if __name__ == "__main__":
    # Without Python's own end, which would wait for threads of what was started.
    status = main()
    sys.stdout.flush()
    os._exit(status)
