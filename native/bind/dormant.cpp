// A fork that sleeps in C until it is needed. Most are never: what a fork costs is then its page tables, and not the
// some 400 pages that the interpreter writes to, and so copies, as soon as it runs.
#include <poll.h>
#include <sys/socket.h>

#include "handle.hpp"

namespace procession::bind {
namespace {

// So often the child looks whether its parent is still there: whoever else was forked has a copy of the other end, so
// that its closing alone says nothing.
constexpr int kParentCheckMs = 1000;

/// Until there is a byte on `fd`; ends the process when the other end is closed, or the parent gone.
void sleep_until_needed(int fd, pid_t parent) noexcept {
  for (;;) {
    pollfd waiting{fd, POLLIN, 0};
    const int ready = poll(&waiting, 1, kParentCheckMs);
    if (getppid() != parent) _exit(0);
    if (ready <= 0) continue;
    char byte;
    const ssize_t n = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n > 0) return;
    if (n == 0 || (errno != EAGAIN && errno != EINTR)) _exit(0);
  }
}

PyObject* fork_dormant(PyObject*, PyObject* args) noexcept {
  int ours, theirs;
  if (!PyArg_ParseTuple(args, "ii:_fork_dormant", &ours, &theirs)) return nullptr;
  const pid_t parent = getpid();
  sigset_t interrupt, before;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  PyOS_BeforeFork();
  pthread_sigmask(SIG_BLOCK, &interrupt, &before);
  const pid_t pid = fork();
  const int error = errno;
  if (pid == 0) {
    signal(SIGINT, SIG_IGN);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    close(ours);
    arm_inherited_lifeline();
    sleep_until_needed(theirs, parent);
    PyOS_AfterFork_Child();  // also forgets the signals that came meanwhile
    return PyLong_FromLong(0);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  PyOS_AfterFork_Parent();
  if (pid < 0) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
  }
  return PyLong_FromLong(pid);
}

PyMethodDef functions[] = {
    {"_fork_dormant", fork_dormant, METH_VARARGS,
     "_fork_dormant(ours, theirs) -> int\n--\n\nFork a child that closes the socket `ours` and sleeps until there is "
     "something to read on `theirs`.\n\nReturns its pid here, and 0 there once it is awake, with SIGINT ignored. It "
     "ends "
     "when this process does, or the other end of `theirs` is closed."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_dormant_functions(PyObject* module) noexcept { return PyModule_AddFunctions(module, functions) == 0; }

}  // namespace procession::bind
