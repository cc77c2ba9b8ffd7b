// The extension module.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace {
PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "procession._native", "The parts of procession that live in shared memory.",
    -1, nullptr, nullptr, nullptr, nullptr, nullptr,
};
}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module_definition); }
