// Who dies with whom: a pipe that only one process can write to, and the kernel's signal to its children when it is closed.
//
// Each process that starts others has a *lifeline*: a pipe of whose writing end it has the only copy (it is closed in whatever
// is forked, and at exec). Its children have the reading end, each a description of its own with O_ASYNC, so that the kernel
// sends them a signal when the writing end is gone, however the process died. No thread waits for it, no lock of the
// interpreter's is needed, and it costs nothing until then. PR_SET_PDEATHSIG does not do: it comes when the *thread* that
// started the child ends, and of a child of a fork server or template, when that ends.
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>

#include "handle.hpp"

namespace procession::bind {
namespace {

// After the signal: long enough for a process that waits for its parent's death to do what it wants to do then.
constexpr long kGraceNs = 500'000'000;

/// An end of a pipe. What user code closes (a daemon closes all that it finds) may be another file's number by now.
struct End {
  int fd = -1;
  ino_t pipe = 0;

  void set(int to) noexcept {
    struct stat s;
    fd = to;
    pipe = fstat(fd, &s) == 0 ? s.st_ino : 0;
  }
  bool is_there() const noexcept {
    struct stat s;
    return fd >= 0 && fstat(fd, &s) == 0 && s.st_ino == pipe;
  }
  void close() noexcept {
    if (is_there()) ::close(fd);
    fd = -1;
  }
};

struct {
  End read, write;  // this process's
  End inherited;    // its parent's, not looked at yet
  End armed;        // its parent's; the kernel tells when it breaks
} line;
timer_t timer;

int parent_signal() noexcept { return SIGRTMAX - 1; }

/// In whatever has been forked, by whomever.
void after_fork() noexcept {
  line.write.close();
  line.armed.close();
  if (!line.read.is_there()) return;
  line.inherited.close();
  line.inherited = line.read;
  line.read.fd = -1;
}

bool watch_forks() noexcept {
  static const int failed = pthread_atfork(nullptr, nullptr, after_fork);
  errno = failed;
  return failed == 0;
}

/// The end is near: no lock, no memory, no interpreter.
void on_parents_death(int) noexcept {
  const int saved = errno;
  itimerspec soon{};
  soon.it_value.tv_nsec = kGraceNs;
  timer_settime(timer, 0, &soon, nullptr);
  errno = saved;
}

bool arm(int fd) noexcept {
  if (!watch_forks()) return false;
  // A description of its own: the owner of one is told, and the siblings share theirs.
  char path[40];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  const int own = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (own < 0) return false;
  sigevent event{};
  event.sigev_notify = SIGEV_SIGNAL;
  event.sigev_signo = SIGKILL;
  struct sigaction action = {};
  action.sa_handler = on_parents_death;
  action.sa_flags = SA_RESTART | SA_ONSTACK;
  sigset_t unblocked;
  sigemptyset(&unblocked);
  sigaddset(&unblocked, parent_signal());
  const bool ok = timer_create(CLOCK_MONOTONIC, &event, &timer) == 0 &&
                  sigaction(parent_signal(), &action, nullptr) == 0 && fcntl(own, F_SETOWN, getpid()) == 0 &&
                  fcntl(own, F_SETSIG, parent_signal()) == 0 &&
                  fcntl(own, F_SETFL, O_RDONLY | O_NONBLOCK | O_ASYNC) == 0;
  if (!ok) {
    close(own);
    return false;
  }
  pthread_sigmask(SIG_UNBLOCK, &unblocked, nullptr);
  line.armed.close();
  line.armed.set(own);
  pollfd broken{own, 0, 0};
  if (poll(&broken, 1, 0) > 0) raise(parent_signal());  // before it was armed
  return true;
}

PyObject* lifeline(PyObject*, PyObject*) noexcept {
  if (!line.read.is_there() || !line.write.is_there()) {
    int ends[2];
    if (!watch_forks() || pipe2(ends, O_CLOEXEC) != 0) return PyErr_SetFromErrno(PyExc_OSError);
    line.read.set(ends[0]);
    line.write.set(ends[1]);
  }
  return Py_BuildValue("ii", line.read.fd, line.write.fd);
}

PyObject* arm_lifeline(PyObject*, PyObject* args) noexcept {
  int fd = line.inherited.is_there() ? line.inherited.fd : -1;
  if (!PyArg_ParseTuple(args, "|i:_arm_lifeline", &fd)) return nullptr;
  if (fd < 0) Py_RETURN_NONE;
  if (!arm(fd)) return PyErr_SetFromErrno(PyExc_OSError);
  if (fd == line.inherited.fd) line.inherited.close();
  Py_RETURN_NONE;
}

PyObject* drop_lifeline(PyObject*, PyObject*) noexcept {
  line.inherited.close();
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"_lifeline", lifeline, METH_NOARGS,
     "_lifeline() -> (int, int)\n--\n\nThe descriptor that a child of this process is to be given, or inherits by "
     "fork; "
     "and the one that only this process has."},
    {"_arm_lifeline", arm_lifeline, METH_VARARGS,
     "_arm_lifeline(fd=...)\n--\n\nHave this process killed half a second after the process whose lifeline `fd` is "
     "(default: the one it was forked by, if that has one) has ended, however it did. `fd` is not needed any more "
     "afterwards.\n\nRaises OSError where the kernel cannot do that, or /proc is missing."},
    {"_drop_lifeline", drop_lifeline, METH_NOARGS,
     "_drop_lifeline()\n--\n\nThis process is to outlive the one that it was forked by."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void arm_inherited_lifeline() noexcept {
  if (line.inherited.is_there()) arm(line.inherited.fd);
}

bool add_lifeline_functions(PyObject* module) noexcept { return PyModule_AddFunctions(module, functions) == 0; }

}  // namespace procession::bind
