"""Programs that try to get out of the `process` sandbox. None may pass, change HOME, tell KEY or disturb PARENT.

Each stands after `HOME, PARENT, PORT = ...`: a folder of the user's, the process that called run_python, and the TCP and
UDP port it listens at. HOME holds notes.txt, key.txt, notes.py, an empty folder sub and a socket: sandbox_matrix.py.
"""

# ruff: noqa: E501

from __future__ import annotations

# Empties the guard's hook and brings back the calls it replaced, as a hostile program could: the walls are what holds.
DISARM = """
import gc, types
for f in gc.get_objects():
    if isinstance(f, types.FunctionType) and f.__name__ == "judge" and f.__code__.co_freevars:
        free = f.__code__.co_freevars
        names = {}
        exec(f"def outer():\\n {' = '.join(free)} = 0\\n def judge(event, args):\\n  return\\n  {', '.join(free)}"
             "\\n return judge\\njudge = outer()", names)
        f.__code__ = names["judge"].__code__
import _imp, importlib, importlib.machinery, os, signal, sys
for name, place in (("posix", os), ("_signal", signal)):
    fresh = _imp.create_builtin(importlib.machinery.ModuleSpec(name, None))
    _imp.exec_builtin(fresh)
    vars(place).update({k: v for k, v in vars(fresh).items() if not k.startswith("__")})
    sys.modules[name] = fresh
for name in ("_multiprocessing", "_posixsubprocess"):
    sys.modules.pop(name, None)
    importlib.import_module(name)
"""

FILES = {
    "open a file": "open(HOME + '/new', 'w')",
    "append to a file": "open(HOME + '/notes.txt', 'a').write('x')",
    "read a file": "print(open(HOME + '/key.txt').read())",
    "low-level open": "import os\nos.open(HOME + '/new', os.O_CREAT | os.O_WRONLY)",
    "open a system file": "open('/usr/new', 'w')",
    "open that truncates": "import os\nos.close(os.open(HOME + '/notes.txt', os.O_RDONLY | os.O_TRUNC))",
    "a temporary file without a name": "import os\nos.open(HOME, os.O_TMPFILE | os.O_RDWR)",
    "pathlib": "import pathlib\npathlib.Path(HOME, 'new').write_text('x')",
    "list a folder": "import os\nprint(os.listdir(HOME))",
    "scan a folder": "import os\nprint([e.name for e in os.scandir(HOME)])",
    "make a folder": "import os\nos.mkdir(HOME + '/made')",
    "remove a file": "import os\nos.remove(HOME + '/notes.txt')",
    "remove a folder": "import os\nos.rmdir(HOME + '/sub')",
    "remove everything": "import shutil\nshutil.rmtree(HOME)",
    "rename": "import os\nos.rename(HOME + '/notes.txt', HOME + '/renamed')",
    "rename into the folder": "import os\nos.rename(HOME + '/notes.txt', 'taken')",
    "rename out of the folder": "import os\nopen('x', 'w').close(); os.replace('x', HOME + '/notes.txt')",
    "a hard link out": "import os\nopen('x', 'w').close(); os.link('x', HOME + '/linked')",
    "a hard link in": "import os\nos.link(HOME + '/key.txt', 'linked'); print(open('linked').read())",
    "a symbolic link out": "import os\nos.symlink('/usr', HOME + '/linked')",
    "through a symbolic link": "import os\nos.symlink(HOME, 'u'); open('u/new', 'w')",
    "through a link that is read": "import os\nos.symlink(HOME + '/key.txt', 'u'); print(open('u').read())",
    "truncate": "import os\nos.truncate(HOME + '/notes.txt', 0)",
    "change a mode": "import os\nos.chmod(HOME + '/notes.txt', 0o777)",
    "change a mode through a link": "import os\nos.symlink(HOME + '/notes.txt', 'u'); os.chmod('u', 0o777)",
    "change times": "import os\nos.utime(HOME + '/notes.txt', (1, 1))",
    "change an owner": "import os\nos.chown(HOME + '/notes.txt', os.getuid(), os.getgid())",
    "set an attribute": "import os\nos.setxattr(HOME + '/notes.txt', 'user.x', b'1')",
    "read an attribute": "import os\nprint(os.getxattr(HOME + '/notes.txt', 'user.key'))",
    "copy out": "import shutil\nopen('x', 'w').close(); shutil.copy('x', HOME + '/new')",
    "copy in": "import shutil\nshutil.copy(HOME + '/key.txt', 'x'); print(open('x').read())",
    "a folder's descriptor": "import os\nd = os.open(HOME, os.O_RDONLY); os.open('new', os.O_CREAT | os.O_WRONLY, dir_fd=d)",
    "a folder's descriptor and ..": (
        "import os\nos.makedirs('a/b/c/d/e/f/g/h/i/j'); d = os.open('.', os.O_RDONLY); os.chdir('a/b/c/d/e/f/g/h/i/j')\n"
        "os.open('../' * 9 + HOME[1:] + '/new', os.O_CREAT | os.O_WRONLY, dir_fd=d)"
    ),
    "make by descriptor": "import os\nd = os.open(HOME, os.O_PATH); os.mkdir('made', dir_fd=d)",
    "a system folder's descriptor": (
        "import os\nos.makedirs('a/b/c/d'); d = os.open('/usr', os.O_RDONLY); os.chdir('a/b/c/d')\n"
        "os.open('..' + HOME + '/new', os.O_CREAT | os.O_WRONLY, dir_fd=d)"
    ),
    "chdir out, then write": "import os\nos.chdir(HOME); open('new', 'w')",
    "chdir out by descriptor": "import os\nd = os.open(HOME, os.O_PATH); os.fchdir(d); open('new', 'w')",
    "a log file": "import logging\nlogging.FileHandler(HOME + '/log').emit(logging.makeLogRecord({}))",
    "a shelf": "import shelve\nshelve.open(HOME + '/shelf')['a'] = 1",
    "dbm": "import dbm\ndbm.open(HOME + '/dbm', 'c')['a'] = 'b'",
    "dbm, the C library's": "import _dbm\n_dbm.open(HOME + '/dbm', 'c')['a'] = 'b'",
    "dbm, GNU's": "import _gdbm\n_gdbm.open(HOME + '/dbm', 'c')['a'] = 'b'",
    "pickle a file": "import pickle\npickle.dump(1, open(HOME + '/new', 'wb'))",
    "tracemalloc": "import tracemalloc\ntracemalloc.start(); tracemalloc.take_snapshot().dump(HOME + '/new')",
    "a profile": "import cProfile\ncProfile.run('1', HOME + '/new')",
    "faulthandler": "import faulthandler\nfaulthandler.dump_traceback(open(HOME + '/new', 'w'))",
    "an archive extracted": (
        "import io, tarfile\nb = io.BytesIO()\nwith tarfile.open(fileobj=b, mode='w') as t:\n"
        "    i = tarfile.TarInfo(HOME + '/new'); i.size = 1; t.addfile(i, io.BytesIO(b'x'))\n"
        "b.seek(0); tarfile.open(fileobj=b).extract(i, '/')"
    ),
    "a sparse copy": "import os\nos.sendfile(os.open(HOME + '/notes.txt', os.O_WRONLY), 0, 0, 1)",
    "bytecode written": "import py_compile\nopen('m.py', 'w').close(); py_compile.compile('m.py', HOME + '/m.pyc')",
    "a secret linked into a module": "import sys\nsys.path.insert(0, HOME); import notes",
    "zipimport": "import zipimport\nzipimport.zipimporter(HOME + '/key.txt')",
    "linecache": "import linecache\nprint(linecache.getlines(HOME + '/key.txt')[0])",
    "mmap": "import mmap, os\nmmap.mmap(os.open(HOME + '/notes.txt', os.O_RDWR), 1)[0] = 65",
}
C_CODE = {
    "history written": "import readline\nreadline.add_history('x'); readline.write_history_file(HOME + '/notes.txt')",
    "history appended": "import readline\nreadline.add_history('x'); readline.append_history_file(1, HOME + '/notes.txt')",
    "history read": "import readline\nreadline.read_history_file(HOME + '/key.txt'); print(readline.get_history_item(1))",
    "an init file read": "import readline\nreadline.read_init_file(HOME + '/key.txt')",
    "readline by another way": (
        "import importlib.util as u\ns = u.find_spec('readline'); m = u.module_from_spec(s)\n"
        "s.loader.exec_module(m); m.write_history_file(HOME + '/notes.txt')"
    ),
    "a database": "import sqlite3\nsqlite3.connect(HOME + '/db').execute('create table t(a)')",
    "a database by URI": "import sqlite3\nsqlite3.connect(f'file://{HOME}/db?mode=rwc', uri=True).execute('create table t(a)')",
    "a database by host": (
        "import sqlite3\nsqlite3.connect(f'file://localhost{HOME}/db', uri=True).execute('create table t(a)')"
    ),
    "a database by escapes": (
        "import sqlite3\nu = 'file:' + ''.join('%%%02x' % c for c in (HOME + '/db').encode())\n"
        "sqlite3.connect(u, uri=True).execute('create table t(a)')"
    ),
    "a database by bytes": "import sqlite3\nsqlite3.connect(HOME.encode() + b'/db').execute('create table t(a)')",
    "a database of one's own kind": (
        "import sqlite3\nclass C(sqlite3.Connection):\n    def set_authorizer(self, *a): pass\n"
        "c = sqlite3.connect(':memory:', factory=C); c.execute(f\"attach '{HOME}/db' as a\"); c.execute('create table a.t(x)')"
    ),
    "a database attached": (
        "import sqlite3\nc = sqlite3.connect(':memory:', uri=True)\n"
        "c.execute(f\"attach 'file:{HOME}/db?mode=rwc' as a\"); c.execute('create table a.t(x)')"
    ),
    "a database attached by value": (
        "import sqlite3\nc = sqlite3.connect('x.db'); c.execute('attach ? as a', [HOME + '/db']); c.execute('create table a.t(x)')"
    ),
    "a database vacuumed": "import sqlite3\nc = sqlite3.connect('x.db'); c.execute('create table t(a)'); c.execute('vacuum into ?', [HOME + '/db'])",
    "a database backed up": "import sqlite3\nsqlite3.connect(':memory:').backup(sqlite3.connect(HOME + '/db'))",
    "a database's extension": "import sqlite3\nc = sqlite3.connect(':memory:'); c.enable_load_extension(True); c.load_extension('x')",
    "a pipe": "import os\nos.mkfifo(HOME + '/pipe')",
    "a pipe by descriptor": "import os\nos.mkfifo('pipe', dir_fd=os.open(HOME, os.O_PATH))",
    "a node": "import os\nos.mknod(HOME + '/node')",
    "a node, posix": "import posix\nposix.mknod(HOME + '/node')",
    "chdir out, then a pipe": "import os\nos.chdir(HOME); os.mkfifo('pipe')",
    "ctypes": "import ctypes\nctypes.CDLL(None).creat((HOME + '/new').encode(), 0o600)\n1 / 0",
    "ctypes, inside": "import _ctypes\n_ctypes.dlopen(None, 0); 1 / 0",
    "a module of one's own": (
        "import importlib.machinery as m, importlib.util as u, shutil, _bz2\nshutil.copyfile(_bz2.__file__, '_bz2.so')\n"
        "u.module_from_spec(u.spec_from_file_location('_bz2', '_bz2.so', loader=m.ExtensionFileLoader('_bz2', '_bz2.so')))"
    ),
    "another interpreter": (
        "try: import _xxsubinterpreters as s\nexcept ModuleNotFoundError: import _interpreters as s\n"
        'i = s.create(); s.run_string(i, f\'open({HOME!r} + "/new", "w")\')'
    ),
    "test code of Python": 'import _testcapi\n_testcapi.run_in_subinterp(f\'open({HOME!r} + "/new", "w")\') and 1 / 0',
    "shared memory": "import multiprocessing.shared_memory as m\nm.SharedMemory('sftflow-x', True, 10)",
    "a semaphore that stays": (
        "import _multiprocessing as m, os\nm.SemLock(0, 1, 1, '/sftflow-x', False)\nassert os.path.exists('/dev/shm/sem.sftflow-x')"
    ),
    "a terminal": "import curses\ncurses.setupterm()",
    "a pseudo-terminal": "import os\nos.openpty()",
    "a terminal's input": "import fcntl, os\nfcntl.ioctl(os.open('/dev/tty', os.O_RDWR), 0x5412, b'x')",
    "a certificate's key": "import ssl\nssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(HOME + '/key.txt')",
    "a key log": "import ssl\nssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).keylog_filename = HOME + '/new'",
    "perf's map": "import sys\nsys.activate_stack_trampoline('perf')",
    "an entity of XML": (
        "import xml.sax, xml.sax.handler as h\nclass H(h.ContentHandler):\n    def characters(self, c): print(c)\n"
        "p = xml.sax.make_parser(); p.setFeature(h.feature_external_ges, True); p.setContentHandler(H())\n"
        "open('x.xml', 'w').write(f'<!DOCTYPE a [<!ENTITY e SYSTEM \"{HOME}/key.txt\">]><a>&e;</a>'); p.parse('x.xml')"
    ),
}
PROCESSES = {
    "fork": "import os\nos.fork() or os._exit(0)",
    "fork, a terminal": "import os\nos.forkpty()",
    "a command": "import os\nassert os.system('touch ' + HOME + '/new') == 0",
    "a command's output": "import subprocess\nprint(subprocess.run(['cat', HOME + '/key.txt'], capture_output=True, check=True).stdout)",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "exec by descriptor": "import os\nos.execve(os.open('/usr/bin/env', os.O_RDONLY), ['true'], {})",
    "multiprocessing": "import multiprocessing as m\np = m.get_context('fork').Process(target=print); p.start(); p.join()",
    "multiprocessing, spawned": (
        "import multiprocessing.util as u, os\nr, w = os.pipe()\n"
        "pid = u.spawnv_passfds(b'/bin/sh', [b'sh', b'-c', b'echo x > ' + HOME.encode() + b'/new'], [])\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    ),
    "fork_exec": (
        "import _posixsubprocess, os, subprocess, inspect\nr, w = os.pipe()\n"
        "a = [['touch', HOME + '/new'], [b'/usr/bin/touch'], True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w, False, False,"
        " -1, None, None, None, -1, None, False]\npid = _posixsubprocess.fork_exec(*a); assert os.waitpid(pid, 0)[1] == 0"
    ),
    "a browser": "import webbrowser\nassert webbrowser.open('file:///')",
    "end the parent": "import os\nos.kill(PARENT, 9)",
    "stop the parent": "import os, signal\nos.kill(PARENT, signal.SIGSTOP)",
    "end the parent process as seen": "import os\nos.kill(os.getppid() or 10**7, 15)",
    "end all": "import os\nos.kill(-1, 15)",
    "end the group of the parent": "import os\nos.killpg(os.getpgid(PARENT), 15)",
    "a signal by descriptor": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(PARENT), signal.SIGTERM)",
    "a signal by descriptor, as seen": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGTERM)",
    "a signal by a thread": "import os, signal\nfor t in os.listdir(f'/proc/{PARENT}/task'): signal.pthread_kill(int(t), 15)",
    "a signal by a descriptor's owner": (
        "import fcntl, os, socket\na, b = socket.socketpair(); fcntl.fcntl(a, fcntl.F_SETOWN, PARENT)\n"
        "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC); b.send(b'x')"
    ),
    "a signal by a pipe's owner": (
        "import fcntl, os, signal\nr, w = os.pipe(); fcntl.fcntl(r, 10, signal.SIGTERM); fcntl.fcntl(r, fcntl.F_SETOWN, PARENT)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK); os.write(w, b'x')"
    ),
    "the parent's owner by ioctl": "import fcntl, socket, struct\nfcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack('i', PARENT))",
    "the parent's priority": "import os\nos.setpriority(os.PRIO_PROCESS, PARENT, 19)",
    "all the user's priority": "import os\nos.setpriority(os.PRIO_USER, 0, 19)",
    "the parent's processors": "import os\nos.sched_setaffinity(PARENT, {0})",
    "the parent's scheduling": "import os\nos.sched_setscheduler(PARENT, os.SCHED_BATCH, os.sched_param(0))",
    "the parent's limits": "import resource\nresource.prlimit(PARENT, resource.RLIMIT_NOFILE, (3, 3))",
    "limits raised": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))",
    "the parent's memory": "import os\nos.write(os.open(f'/proc/{PARENT}/mem', os.O_RDWR), b'x')",
    "the parent's environment": "print(open(f'/proc/{PARENT}/environ').read())",
    "the parent's descriptors": "import os\nprint(os.listdir(f'/proc/{PARENT}/fd'))",
    "own memory": "import os\nos.open('/proc/self/mem', os.O_RDWR)",
    "the parent's name": "open(f'/proc/{PARENT}/comm', 'w').write('x')",
    "the parent's score": "open(f'/proc/{PARENT}/oom_score_adj', 'w').write('1000')",
    "a process traced": ("import ctypes\nl = ctypes.CDLL(None)\nassert l.ptrace(16, PARENT, 0, 0) == 0"),
    "memory of the parent": (
        "import ctypes\nl = ctypes.CDLL(None); b = ctypes.create_string_buffer(8)\n"
        "class V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
        "assert l.process_vm_readv(PARENT, ctypes.byref(V(ctypes.addressof(b), 8)), 1, ctypes.byref(V(0x400000, 8)), 1, 0) == 8"
    ),
    "another namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "a descriptor of the parent": (
        "import ctypes, os\nl = ctypes.CDLL(None); assert l.syscall(438, l.syscall(434, PARENT, 0), 0, 0) >= 0"
    ),
    "another root": "import os\nos.chroot('.')",
    "root": "import os\nos.setuid(0) if os.getuid() else 1 / 0",
    "a ring of calls": "import ctypes\np = ctypes.create_string_buffer(120)\nassert ctypes.CDLL(None).syscall(425, 4, p) >= 0",
    "memory that stays": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 10, 0o1600) >= 0",
    "a watch": "import ctypes\nl = ctypes.CDLL(None); assert l.inotify_add_watch(l.inotify_init(), HOME.encode(), 0xfff) >= 0",
    "a file by its handle": (
        "import ctypes\nb, m = ctypes.create_string_buffer(b'\\x80', 200), ctypes.c_int()\n"
        "assert ctypes.CDLL(None).name_to_handle_at(-100, HOME.encode(), b, ctypes.byref(m), 0) == 0"
    ),
    "a key of the kernel's": (
        "import ctypes\nassert ctypes.CDLL(None).syscall({'x86_64': 248}.get(__import__('os').uname().machine, 217),"
        " b'user', b'sftflow', b'x', 1, -3) > 0"
    ),
}
NETWORK = {
    "TCP": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2).send(b'x')",
    "TCP, by number": "import socket\nsocket.socket().connect(('127.0.0.1', PORT))",
    "a server": "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "UDP": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "a name": "import socket\nprint(socket.gethostbyname('localhost'))",
    "HTTP": "import urllib.request\nurllib.request.urlopen(f'http://127.0.0.1:{PORT}', timeout=2)",
    "asyncio": "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', PORT))",
    "a socket of the user's": "import socket\nsocket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', HOME + '/socket')",
    "a socket by a pair": "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', HOME + '/socket')",
    "an abstract socket": "import socket\nsocket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', f'\\0sftflow-{PORT}')",
    "a socket made": "import socket\nsocket.socket(socket.AF_UNIX).bind(HOME + '/made')",
    "a pair's name": "import socket\nsocket.socketpair()[0].bind(HOME + '/made')",
    "a raw socket": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "the system's log": "import syslog\nsyslog.syslog('x')",
    "the machine's name": "import socket\nsocket.sethostname('x')",
}
PAYLOADS = {**FILES, **C_CODE, **PROCESSES, **NETWORK}
