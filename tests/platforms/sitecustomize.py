"""Makes our files believe that they run on another system; `run.py` puts this folder on PYTHONPATH.

Python imports it at every start, so child processes and loader workers are under it too. What a system lacks
is hidden from our files only: the standard library and packages ask for the system they were installed for,
and need what it has. MAE_TEST_PLATFORM names the system:

windows     POSIX's modules, functions and signals are missing, signals cannot be sent, a file that is open
            cannot be replaced or removed, links cannot be made, text files are not UTF-8 unless we say so;
            workers are spawned
mac         Linux's functions are missing; workers are spawned
forkserver  fcntl, pwd, resource, os.fork, SIGUSR1, SIGKILL are missing; workers come from a server, as with
            Python 3.14 on Linux
"""

import builtins
import contextlib
import os
import sys
import types
import warnings

SYSTEM = os.environ.get("MAE_TEST_PLATFORM", "")
POSIX_MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
# os.posix_spawn is how a Mac starts children, so it stays there
POSIX = {
    "os": """
        fork forkpty register_at_fork wait wait3 wait4 waitid killpg getpgid getpgrp getsid setsid
        setpgid getuid geteuid getgid getegid getgroups setuid setgid uname sysconf statvfs fstatvfs
        pathconf nice getpriority sched_getaffinity sched_setaffinity sched_yield getloadavg mkfifo
        mknod chown lchown fchown chroot fchdir pread preadv pwrite pwritev readv writev sendfile
        posix_fadvise posix_fallocate pipe2 posix_spawn posix_spawnp getxattr setxattr memfd_create
        environb getresuid WIFSIGNALED WTERMSIG O_NONBLOCK O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_SYNC
        O_DIRECT O_TMPFILE
    """,
    "signal": """
        SIGUSR1 SIGUSR2 SIGKILL SIGHUP SIGQUIT SIGCHLD SIGALRM SIGSTOP SIGCONT SIGTSTP SIGPIPE SIGBUS
        SIG_BLOCK SIG_UNBLOCK SIG_SETMASK pthread_sigmask pthread_kill sigwait sigpending pause alarm
        setitimer siginterrupt
    """,
}
LINUX = {
    "os": "sched_getaffinity sched_setaffinity memfd_create getxattr setxattr posix_fadvise O_DIRECT "
    "O_TMPFILE pipe2 getresuid"
}
FEW = {"os": "fork", "signal": "SIGUSR1 SIGKILL"}
HIDDEN = {
    "windows": (POSIX_MODULES, POSIX),
    "mac": ((), LINUX),
    "forkserver": (("fcntl", "pwd", "resource"), FEW),
}
NAMES = {"windows": {"name": "nt", "platform": "win32"}, "mac": {"platform": "darwin"}}
_LIBRARIES = tuple(os.path.realpath(path) + os.sep for path in {sys.prefix, sys.base_prefix})


def _ours(frame: types.FrameType) -> bool:
    """Whether a frame runs a file of the project: neither of Python nor of a package."""
    file = frame.f_globals.get("__file__")
    if file is None:  # python -c, or a module that is built in
        return frame.f_globals.get("__name__") == "__main__"
    return file != __file__ and not file.startswith("<") and not os.path.realpath(file).startswith(_LIBRARIES)


def _hide(module: types.ModuleType, names: list[str], instead: dict[str, str]) -> None:
    """Takes `names` away from `module`, and gives them back to whoever is not ours.

    instead: what ours see in their place.
    """
    real = {name: vars(module)[name] for name in [*names, *instead] if name in vars(module)}

    class Hiding(type(module)):
        def __getattr__(self, name: str):
            if name in real:
                if not _ours(sys._getframe(1)):
                    return real[name]
                if name in instead:
                    return instead[name]
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r} on {SYSTEM}")

    for name in real:
        delattr(module, name)
    module.__class__ = Hiding


def _hide_modules(names: tuple[str, ...]) -> None:
    real = builtins.__import__

    def importing(name, *arguments, **named):
        if name in names and _ours(sys._getframe(1)):
            raise ModuleNotFoundError(f"No module named {name!r} on {SYSTEM}", name=name)
        return real(name, *arguments, **named)

    builtins.__import__ = importing


def _is_open(path) -> bool:
    """Whether this process has the file open, or mapped into its memory."""
    if isinstance(path, int):
        return False
    full = os.path.realpath(path)
    if full.endswith(".lock"):
        return False  # filelock removes its file when it gives it back; that of Linux leaves it to us
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}") == full:
                return True
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        return any(line.rstrip("\n").endswith(f" {full}") for line in file)


def _guard_files() -> None:
    """Open files cannot be replaced, renamed or removed, signals not be sent, links not be made."""

    def guard(real):
        def call(*paths, **options):
            here = options.get("dir_fd") is None and options.get("src_dir_fd") is None
            for path in paths if here else ():
                if os.path.isfile(path) and not os.path.islink(path) and _is_open(path):
                    raise PermissionError(13, "The process cannot access the file: it is being used", path)
            return real(*paths, **options)

        return call

    def refuse(real):
        def call(*arguments, **options):
            caller = sys._getframe(1)
            if _ours(caller) or "pathlib" in caller.f_code.co_filename:
                raise OSError(22, f"os.{real.__name__} on {SYSTEM}")
            return real(*arguments, **options)

        return call

    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, guard(getattr(os, name)))
    for name in ("kill", "symlink"):
        setattr(os, name, refuse(getattr(os, name)))


if SYSTEM:
    import multiprocessing
    import shutil  # which asks for what there is when it is imported
    import signal

    shutil._use_fd_functions = False
    modules, attributes = HIDDEN[SYSTEM]
    _hide_modules(modules)
    instead = NAMES.get(SYSTEM, {})
    _hide(os, attributes["os"].split(), {key: value for key, value in instead.items() if key == "name"})
    _hide(signal, attributes.get("signal", "").split(), {})
    _hide(sys, [], {key: value for key, value in instead.items() if key == "platform"})
    multiprocessing.set_start_method("forkserver" if SYSTEM == "forkserver" else "spawn")
    warnings.filterwarnings("ignore", category=EncodingWarning)  # run.py asks for them
    if SYSTEM == "windows":
        _guard_files()
        ours = r"(util|tools|demo|main_|models_|engine_|export|plan|predict|report|study|submitit_|__main__)"
        warnings.filterwarnings("error", category=EncodingWarning, module=ours)
