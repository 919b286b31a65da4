"""What a generated program may try, as data. `through(...)` says that it could; a word in @...@ is a
fact of the test: files, sockets and a process that are there to be reached.
"""
# ruff: noqa: E501  (an attempt is a line)

PRELUDE = '''
import errno, os, signal, socket, sys, time

def syscall(number, *arguments):
    """A system call of x86-64, past whatever Python would check; through when it is carried out."""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if os.uname().machine != "x86_64":
        raise OSError(errno.ENOSYS, "other numbers")
    result = libc.syscall(ctypes.c_long(number), *[
        ctypes.c_long(one) if isinstance(one, int) else one for one in arguments
    ])
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result

def holds(read):
    return b"@SECRET@" in (read if isinstance(read, bytes) else str(read).encode())
'''

# Tried in one process, one after the other: what is refused leaves it as it was.
TOGETHER = {
    # Files of the parent and of everyone
    "passwd": "open('/etc/passwd').read(); through()",
    "a secret file": "through() if holds(open('@FILE@').read()) else None",
    "a path upwards": "open('../' * 12 + 'etc/passwd').read(); through()",
    "a path through itself": "open('/proc/self/root/etc/passwd').read(); through()",
    "through an open directory": "d = os.open('/', os.O_RDONLY); os.open('etc/passwd', 0, dir_fd=d); through()",
    "a path handle": "d = os.open('@PLACE@', os.O_PATH); os.open('secret', os.O_RDONLY, dir_fd=d); through()",
    "the root's list": "through() if os.listdir('/') else None",
    "the place's list": "through() if 'secret' in os.listdir('@PLACE@') else None",
    "the home": "through() if os.listdir(os.path.expanduser('~root')) else None",
    "the parent's directory": "through() if os.listdir('/proc/@PARENT@/cwd') else None",
    "the parent's links": "os.readlink('/proc/@PARENT@/cwd'); through()",
    "the parent's environment": "through() if open('/proc/@PARENT@/environ').read() else None",
    "the warden's environment": "through() if open(f'/proc/{os.getppid()}/environ').read() else None",
    "the warden's memory": "open(f'/proc/{os.getppid()}/mem', 'rb'); through()",
    "the parent's memory": "open('/proc/@PARENT@/maps').read(); through()",
    "the first process": "through() if open('/proc/1/cmdline').read() else None",
    "its own environment": "through() if holds(os.environ) else None",
    "inherited descriptors": """
for fd in range(3, 300):
    try:
        os.lseek(fd, 0, 0)
        through(fd) if holds(os.read(fd, 100)) else None
    except OSError:
        pass
""",
    "descriptors by name": "os.listdir('/proc/self/fd'); through()",
    "kernel messages": "open('/dev/kmsg'); through()",
    "a block device": "open('/dev/vda'); through()",
    "physical memory": "open('/dev/mem'); through()",
    "a terminal": "os.open('/dev/tty', os.O_RDWR); through()",
    "core dumps": "open('/proc/sys/kernel/core_pattern', 'w'); through()",
    "handles of files": "syscall(304, -100, b'0' * 128, 0); through()",
    # Writing; what the files then are is looked at from outside too
    "a new file": "open('@PLACE@/new', 'w').close(); through()",
    "a file in its directory": "open('new', 'w').close(); through()",
    "a file in /tmp": "open('/tmp/flowkern-escape', 'w').close(); through()",
    "an unnamed file": "os.open('/tmp', os.O_TMPFILE | os.O_RDWR); through()",
    "shared memory": "open('/dev/shm/flowkern-escape', 'w').close(); through()",
    "shared memory by name": "from multiprocessing.shared_memory import SharedMemory; SharedMemory('x', True, 9); through()",
    "System V memory": "syscall(29, 7, 4096, 0o1666); through()",
    "a System V queue": "syscall(68, 7, 0o1666); through()",
    "System V semaphores": "syscall(64, 7, 1, 0o1666); through()",
    "a semaphore by name": "import multiprocessing; multiprocessing.Semaphore(1); through()",
    "the program's own file": "through() if os.write(0, b'x') else None",
    "more of its own file": "os.ftruncate(0, 2**30); through()",
    "a message queue": "syscall(240, b'escape', 0o102, 0o666, 0); through()",
    "a memory file": "os.memfd_create('x'); through()",
    "more of the secret": "open('@FILE@', 'a').write('more'); through()",
    "a directory": "os.mkdir('@PLACE@/new'); through()",
    "a pipe by name": "os.mkfifo('@PLACE@/new'); through()",
    "a device": "os.mknod('@PLACE@/new', 0o20666, os.makedev(1, 1)); through()",
    "a symbolic link": "os.symlink('@FILE@', 'link'); through(open('link').read())",
    "a symbolic link there": "os.symlink('/etc/passwd', '@PLACE@/new'); through()",
    "a hard link": "os.link('@FILE@', '@PLACE@/new'); through()",
    "a rename": "os.rename('@FILE@', '@PLACE@/new'); through()",
    "a deletion": "os.unlink('@FILE@'); through()",
    "nothing left of it": "os.truncate('@FILE@', 0)",
    "its mode": "os.chmod('@FILE@', 0o777)",
    "its mode by number": "syscall(90, b'@FILE@', 0o777); through()",
    "its mode at a directory": "syscall(268, -100, b'@FILE@', 0o777); through()",
    "its owner": "os.chown('@FILE@', 65534, 65534)",
    "its times": "os.utime('@FILE@', (1, 1))",
    "its attributes": "os.setxattr('@FILE@', 'user.escape', b'x'); through()",
    "what its attributes say": "through() if holds(os.getxattr('@FILE@', 'user.secret')) else None",
    "their names": "through() if os.listxattr('@FILE@') else None",
    "its flags by number": "syscall(469, -100, b'@FILE@', b'\\0' * 32, 32, 0); through()",
    "flags of a library": """
import fcntl
flags, library = bytearray(8), open(os.__file__)
fcntl.ioctl(library, 0x80086601, flags)
fcntl.ioctl(library, 0x40086602, bytes(flags))
through()
""",
    "a project for a library": """
import fcntl
its, library = bytearray(28), open(os.__file__)
fcntl.ioctl(library, 0x801C581F, its)
fcntl.ioctl(library, 0x401C5820, bytes(its))
through()
""",
    "a library for ever": """
import fcntl
try:
    fcntl.ioctl(open(os.__file__), 0x40806685, bytearray(128))
except OSError as error:
    through(error) if error.errno != errno.EPERM else None  # its file system was asked
""",
    "a lease of a library": "import fcntl; fcntl.fcntl(open(os.__file__), 1024, 0); through()",
    "a lease that others wait for": "import fcntl; fcntl.fcntl(open(os.__file__), 1024, 1); through()",
    "a lock of a library": "import fcntl; fcntl.lockf(open(os.__file__), fcntl.LOCK_SH | fcntl.LOCK_NB); through()",
    "watching a directory": "import fcntl; fcntl.fcntl(os.open(os.path.dirname(os.__file__), 0), 1026, 1); through()",
    "a path by openat2": "syscall(437, -100, b'/etc/passwd', b'\\0' * 24, 24); through()",
    "a tree": "os.open('secret', 0, dir_fd=syscall(428, -100, b'@PLACE@', 0)); through()",
    "a handle that is run": "syscall(322, os.open('/bin/true', os.O_PATH), b'', 0, 0, 0x1000); through()",
    # Sockets
    "TCP": "socket.create_connection(('127.0.0.1', @TCP@), 1); through()",
    "TCP over IPv6": "socket.create_connection(('::1', @TCP@), 1); through()",
    "a server": "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); through()",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @UDP@)); through()",
    "a local socket": "s = socket.socket(socket.AF_UNIX); s.connect('@UNIX@'); through()",
    "an abstract socket": "s = socket.socket(socket.AF_UNIX); s.connect('\\0@ABSTRACT@'); through()",
    "an abstract server": "s = socket.socket(socket.AF_UNIX); s.bind('\\0x@ABSTRACT@'); s.listen(); through()",
    "a pair that writes elsewhere": """
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
a.sendto(b'x', '@DATAGRAM@')
through()
""",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); through()",
    "raw packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW); through()",
    "the kernel's ciphers": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET); through()",
    "the host of a virtual machine": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); through()",
    "a socket by number": "syscall(41, 1, 1, 0); through()",
    "a socket by io_uring": "syscall(425, 8, b'0' * 120); through()",
    # Processes
    "fork": "os._exit(0) if (child := os.fork()) == 0 else through(child)",
    "vfork": "through() if syscall(58) >= 0 else None",
    "clone": "os._exit(0) if syscall(56, 17, 0, 0, 0, 0) == 0 else through()",
    "clone3": "syscall(435, b'\\0' * 32 + b'\\x11' + b'\\0' * 55, 88); through()",
    "a program": "import subprocess; subprocess.run(['/bin/true']); through()",
    "a spawned program": "os.posix_spawn('/bin/true', ['true'], {}); through()",
    "a shell": "os.execv('/bin/sh', ['sh', '-c', 'echo THROUGH'])",
    "a command": "through() if os.system('echo x > @PLACE@/new') == 0 else None",
    "a command by ctypes": "import ctypes; through() if ctypes.CDLL(None).system(b'true') == 0 else None",
    "its parent's life": "os.kill(os.getppid(), 0); through()",
    "the run's life": "os.kill(@PARENT@, 0); through()",
    "the victim": "os.kill(@VICTIM@, signal.SIGKILL); through()",
    "the victim's group": "os.killpg(@VICTIM@, signal.SIGKILL); through()",
    "the victim's thread": "syscall(234, @VICTIM@, @VICTIM@, 9); through()",
    "the victim by a queue": "syscall(129, @VICTIM@, 9, b'\\0' * 128); through()",
    "the victim by descriptor": "syscall(424, syscall(434, @VICTIM@, 0), 9, 0, 0); through()",
    "the victim's limits": "import resource; resource.prlimit(@VICTIM@, resource.RLIMIT_CPU, (1, 1)); through()",
    "the victim's limits by number": "syscall(302, @VICTIM@, 0, b'\\1' + b'\\0' * 15, 0); through()",
    "the victim's processors": "os.sched_setaffinity(@VICTIM@, {0}); through()",
    "the victim's turn": "os.setpriority(os.PRIO_PROCESS, @VICTIM@, 19); through()",
    "the victim's disk": "syscall(251, 1, @VICTIM@, 0x6000); through()",
    "the victim by a pipe": """
import fcntl
r, w = os.pipe()
fcntl.fcntl(r, 10, 9)  # F_SETSIG: that signal when there is something to read
fcntl.fcntl(r, fcntl.F_SETOWN, @VICTIM@)
fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
os.write(w, b'x')
""",
    "ptrace": "syscall(101, 0x4206, @VICTIM@, 0, 0); through()",
    "ptrace of the warden": "syscall(101, 16, os.getppid(), 0, 0); through()",
    "reading its memory": "syscall(310, os.getppid(), b'0' * 16, 1, b'0' * 16, 1, 0); through()",
    "to outlive its parent": "syscall(157, 1, 0, 0, 0, 0); through()",
    "a session of its own": "syscall(112); through()",
    # The kernel
    "mount": "syscall(165, b'none', b'/tmp', b'tmpfs', 0, 0); through()",
    "a new mount": "syscall(430, b'tmpfs', 0); through()",
    "chroot": "os.chroot('@PLACE@'); through()",
    "pivot_root": "syscall(155, b'/', b'/'); through()",
    "a user namespace": "syscall(272, 0x10000000); through()",
    "a mount namespace": "syscall(272, 0x20000); through()",
    "the namespace of another": "syscall(308, 0, 0); through()",
    "another user": "os.setuid(65534); through()",
    "all users": "syscall(117, 0, 0, 0); through()",
    "capabilities": "syscall(126, b'\\x22\\x05\\x08\\x20\\0\\0\\0\\0', b'\\xff' * 24); through()",
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); through()",
    "more memory by number": "syscall(160, 9, b'\\xff' * 16); through()",
    "a module": "syscall(175, b'0' * 64, 64, b''); through()",
    "BPF": "syscall(321, 0, b'\\0' * 120, 120); through()",
    "page faults": "syscall(323, 0); through()",
    "performance counters": "syscall(298, b'\\0' * 120, 0, -1, -1, 0); through()",
    "keys": "syscall(250, 0, -3, 0); through()",
    "a key": "syscall(248, b'user', b'x', b'y', 1, -3); through()",
    "the mounts": "import struct; syscall(458, struct.pack('IIQQ', 24, 0, 2**64 - 1, 0), b'\\0' * 512, 64, 0); through()",
    "ports": "syscall(172, 3); through()",
    "memory that stays": "syscall(151, 3); through()",
    "a terminal's input": "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); through()",
    "a terminal of its own": "import pty; pty.openpty(); through()",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, time.time()); through()",
    "the host's name": "socket.sethostname(socket.gethostname()); through()",
    "watching files": "syscall(254, syscall(294, 0), b'/tmp', 0xfff); through()",
    "the layout of its memory": "syscall(135, 0x0040000); through()",
    "kernel log": "syscall(103, 3, b'0' * 100, 100); through()",
}

# Each in a process of its own, of .4 s and 128 MiB: what it may do is to end, or to be ended.
ALONE = {
    "memory": """
x = []
while True:
    x.append(bytearray(2**24))
    through() if len(x) > 20 else None
""",
    "memory of mappings": """
import mmap
x = [mmap.mmap(-1, 2**26) for _ in range(9)]
for one in x:
    one.write(b'x' * 2**26)
through()
""",
    "a loop": "while True: pass",
    "a stop": "os.kill(os.getpid(), signal.SIGSTOP)",
    "a loop that hears nothing": """
for n in range(1, 65):
    try:
        signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
os.close(1); os.close(2)
while True: pass
""",
    "sleep": "time.sleep(60)",
    "C that does not listen": "import re; re.match('(a|a)*$', 'a' * 40 + 'b')",
    "a flood": "while True: print('flood' * 100)",
    "a flood of errors": "while True: os.write(2, b'flood' * 100)",
    "an end": "print('said'); os._exit(7)",
    "deep recursion": "sys.setrecursionlimit(10**8)\ndef f(): f()\nf()",
}

# The same, for a process of the kernel; WebAssembly knows neither ctypes nor fork nor threads, and
# is tried with all of them in one.
OF_A_PROCESS = {
    "a socket by another number": "syscall(0x40000029, 1, 1, 0); through()",
    "a shell by the loader": "os.execv('/lib64/ld-linux-x86-64.so.2', ['ld', '/bin/sh', '-c', 'echo THROUGH'])",
    "a socket by a 32-bit call": """
import ctypes, mmap  # int 0x80, socket(AF_UNIX, SOCK_STREAM)
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("53b867010000bb01000000b901000000ba00000000cd805bc3"))
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
through() if os.uname().machine == "x86_64" and call() >= 0 else None
""",
    "a crash": "import ctypes; ctypes.string_at(0)",
    "a thread that stays": """
import threading
threading.Thread(target=lambda: [time.sleep(.1) for _ in range(600)]).start()
""",
    "forks without end": """
end = time.time() + .3
while time.time() < end:
    try:
        os.fork()
        through()
    except (OSError, AttributeError):
        pass
""",
    "a grandchild": """
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
through()
""",
    "threads without end": """
import threading
threading.stack_size(32768)
while True:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
""",
}
