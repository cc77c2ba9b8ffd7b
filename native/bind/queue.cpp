#include "handle.hpp"
namespace procession::bind { bool add_queue_types(PyObject*) noexcept { return true; } }
