#include "pickler.hpp"

#include <utility>

namespace procession::bind {
namespace {

// What ForkingPickler.dumps does (the reducers that multiprocessing and torch register apply), without its Python class and
// its ChainMap: one C pickler is kept and used again. `Sink` is its file, `Reducers` its dispatch table.

struct Sink {
  PyObject ob_base;
  PyObject* first;    ///< most pickles come in one piece
  PyObject* others;   ///< a list, for those that do not
  PyObject* buffers;  ///< a list of those that are not in it; nullptr if there are none
  Py_ssize_t least;   ///< how long they are at least
};

/// The pickler asks whether a buffer goes into the pickle.
PyObject* sink_buffer(PyObject* self, PyObject* buffer) noexcept {
  auto* s = reinterpret_cast<Sink*>(self);
  const Py_buffer* view = PyPickleBuffer_GetBuffer(buffer);
  if (view == nullptr) return nullptr;
  if ((view->len < s->least && !is_frozen(*view)) || PyBuffer_IsContiguous(view, 'A') == 0) Py_RETURN_TRUE;
  if (s->buffers == nullptr && (s->buffers = PyList_New(0)) == nullptr) return nullptr;
  return PyList_Append(s->buffers, buffer) != 0 ? nullptr : Py_NewRef(Py_False);
}

PyObject* sink_write(PyObject* self, PyObject* data) noexcept {
  auto* s = reinterpret_cast<Sink*>(self);
  // The pickler reuses nothing it hands out as bytes; anything else (a memoryview of the caller's buffer) is copied now.
  PyObject* piece = PyBytes_CheckExact(data) ? Py_NewRef(data) : PyBytes_FromObject(data);
  if (piece == nullptr) return nullptr;
  const Py_ssize_t n = PyBytes_GET_SIZE(piece);
  if (s->first == nullptr) {
    s->first = piece;
    return PyLong_FromSsize_t(n);
  }
  if (s->others == nullptr) s->others = PyList_New(0);
  const int failed = s->others == nullptr ? -1 : PyList_Append(s->others, piece);
  Py_DECREF(piece);
  return failed != 0 ? nullptr : PyLong_FromSsize_t(n);
}

PyMethodDef sink_methods[] = {
    {"write", sink_write, METH_O, nullptr}, {"buffer", sink_buffer, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};

void sink_dealloc(PyObject* self) noexcept {
  auto* s = reinterpret_cast<Sink*>(self);
  Py_XDECREF(s->first);
  Py_XDECREF(s->others);
  Py_XDECREF(s->buffers);
  PyObject_Free(self);
}

PyTypeObject make_sink_type() noexcept {
  PyTypeObject t{};
  t.ob_base = PyVarObject{PyObject_HEAD_INIT(nullptr) 0};
  t.tp_name = "procession._native._Sink";
  t.tp_basicsize = sizeof(Sink);
  t.tp_dealloc = sink_dealloc;
  t.tp_methods = sink_methods;
  t.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  return t;
}
PyTypeObject sink_type = make_sink_type();

struct Names {
  PyObject *pickler_type, *copyreg_table, *extra_reducers, *reduce, *reduce_ex, *protocol;
};
Names names{};

bool is_torchs(PyObject* reducer) noexcept {
  if (!PyFunction_Check(reducer)) return false;
  PyObject* module = PyFunction_GetModule(reducer);
  return module != nullptr && PyUnicode_Check(module) &&
         PyUnicode_CompareWithASCIIString(module, "torch.multiprocessing.reductions") == 0;
}

/// See procession._wire.tensors.
PyObject* instead_of(PyObject* reducer) noexcept {
  static PyObject* function = nullptr;
  if (function == nullptr && (function = import_from("procession._wire.tensors", "instead_of")) == nullptr)
    return nullptr;
  return PyObject_CallOneArg(function, reducer);
}

/// What the pickler asks for a type's reducer: multiprocessing's table, then copyreg's, as they are at that moment (torch
/// and others register, and replace, while the program runs).
PyObject* reducer_of(PyObject*, PyObject* type) noexcept {
  for (PyObject* table : {names.extra_reducers, names.copyreg_table}) {
    PyObject* found = PyDict_GetItemWithError(table, type);
    if (found != nullptr) return is_torchs(found) ? instead_of(found) : Py_NewRef(found);
    if (PyErr_Occurred()) return nullptr;
  }
  PyObject* reducer = array_reducer(type);
  if (reducer != nullptr) return Py_NewRef(reducer);
  // A miss would be a KeyError made and dropped for every instance, some 150 ns; what the pickler does after it is to call
  // __reduce_ex__, except for classes.
  if (PyType_Check(type) && !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type), &PyType_Type))
    return Py_NewRef(names.reduce);
  PyErr_SetObject(PyExc_KeyError, type);
  return nullptr;
}

PyObject* reduce(PyObject*, PyObject* value) noexcept {
  return PyObject_CallMethodObjArgs(value, names.reduce_ex, names.protocol, nullptr);
}
PyMethodDef reduce_method = {"_reduce", reduce, METH_O, nullptr};

PyMappingMethods reducers_mapping{nullptr, reducer_of, nullptr};

PyTypeObject make_reducers_type() noexcept {
  PyTypeObject t{};
  t.ob_base = PyVarObject{PyObject_HEAD_INIT(nullptr) 0};
  t.tp_name = "procession._native._Reducers";
  t.tp_basicsize = sizeof(PyObject);
  t.tp_dealloc = [](PyObject* self) { PyObject_Free(self); };
  t.tp_as_mapping = &reducers_mapping;
  t.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  return t;
}
PyTypeObject reducers_type = make_reducers_type();

/// A pickler with its file and table. One is kept; a nested dump (a reducer that puts into a queue) makes another.
struct Pickler {
  PyObject* pickler = nullptr;
  PyObject* dump = nullptr;
  PyObject* clear_memo = nullptr;
  PyObject* sink = nullptr;

  void destroy() noexcept {
    Py_CLEAR(pickler);
    Py_CLEAR(dump);
    Py_CLEAR(clear_memo);
    Py_CLEAR(sink);
  }
};
Pickler spare;

bool find_names() noexcept {
  if (names.extra_reducers != nullptr) return true;
  if (PyType_Ready(&sink_type) != 0 || PyType_Ready(&reducers_type) != 0) return false;
  names.pickler_type = import_from("_pickle", "Pickler");
  names.copyreg_table = import_from("copyreg", "dispatch_table");
  // Where there are connections, their module has registered its reducers; 5 ms to import it for nothing.
  PyObject* forking = import_from("multiprocessing.reduction", "ForkingPickler");
  PyObject* extra = forking == nullptr ? nullptr : PyObject_GetAttrString(forking, "_extra_reducers");
  Py_XDECREF(forking);
  names.reduce = PyCFunction_New(&reduce_method, nullptr);
  names.reduce_ex = PyUnicode_InternFromString("__reduce_ex__");
  PyObject* protocol = import_from("pickle", "HIGHEST_PROTOCOL");
  names.protocol = protocol;
  if (names.reduce == nullptr || names.reduce_ex == nullptr || protocol == nullptr) return false;
  if (names.pickler_type == nullptr || names.copyreg_table == nullptr || extra == nullptr) return false;
  names.extra_reducers = extra;
  return true;
}

bool make_pickler(Pickler& p) noexcept {
  p.sink = reinterpret_cast<PyObject*>(PyObject_New(Sink, &sink_type));
  if (p.sink == nullptr) return false;
  auto* s = reinterpret_cast<Sink*>(p.sink);
  s->first = s->others = s->buffers = nullptr;
  PyObject* callback = PyObject_GetAttrString(p.sink, "buffer");
  p.pickler =
      callback == nullptr ? nullptr : PyObject_CallFunction(names.pickler_type, "OiOO", p.sink, -1, Py_True, callback);
  Py_XDECREF(callback);
  PyObject* table = p.pickler == nullptr ? nullptr : PyObject_New(PyObject, &reducers_type);
  const bool ok = table != nullptr && PyObject_SetAttrString(p.pickler, "dispatch_table", table) == 0 &&
                  (p.dump = PyObject_GetAttrString(p.pickler, "dump")) != nullptr &&
                  (p.clear_memo = PyObject_GetAttrString(p.pickler, "clear_memo")) != nullptr;
  Py_XDECREF(table);
  return ok;
}

}  // namespace

PyObject* import_from(const char* module, const char* name) noexcept {
  PyObject* m = PyImport_ImportModule(module);
  PyObject* r = m == nullptr ? nullptr : PyObject_GetAttrString(m, name);
  Py_XDECREF(m);
  return r;
}

bool has_reducer(PyObject* type) noexcept {
  if (!find_names()) {
    PyErr_Clear();
    return false;
  }
  return PyDict_GetItem(names.extra_reducers, type) != nullptr || PyDict_GetItem(names.copyreg_table, type) != nullptr;
}

PyObject* unpickle(PyObject* data, PyObject* buffers) noexcept {
  static PyObject *loads = nullptr, *keyword = nullptr;
  if (loads == nullptr && (loads = import_from("_pickle", "loads")) == nullptr) return nullptr;
  if (buffers == nullptr) return PyObject_CallOneArg(loads, data);
  if (keyword == nullptr && (keyword = Py_BuildValue("(s)", "buffers")) == nullptr) return nullptr;
  PyObject* const args[] = {data, buffers};
  return PyObject_Vectorcall(loads, args, 1, keyword);
}

PyObject* pickle(PyObject* value, Py_ssize_t least, PyObject** buffers) noexcept {
  if (!find_names()) return nullptr;
  Pickler p = spare;
  spare = Pickler{};
  if (p.pickler == nullptr && !make_pickler(p)) {
    p.destroy();
    return nullptr;
  }
  auto* s = reinterpret_cast<Sink*>(p.sink);
  s->least = least;
  PyObject* r = PyObject_CallOneArg(p.dump, value);
  PyObject* bytes = nullptr;
  if (r != nullptr) {
    Py_DECREF(r);
    r = PyObject_CallNoArgs(p.clear_memo);
    Py_XDECREF(r);
    bytes = std::exchange(s->first, nullptr);
    if (bytes != nullptr && s->others != nullptr) {
      PyObject* empty = PyBytes_FromStringAndSize("", 0);
      PyList_Insert(s->others, 0, bytes);
      Py_SETREF(bytes, empty == nullptr ? nullptr : PyObject_CallMethod(empty, "join", "O", s->others));
      Py_XDECREF(empty);
    }
    Py_CLEAR(s->others);
    if (bytes != nullptr) *buffers = std::exchange(s->buffers, nullptr);
  }
  if (bytes == nullptr || spare.pickler != nullptr) {
    p.destroy();  // after an error its state is not to be trusted
  } else {
    spare = p;
  }
  return bytes;
}

}  // namespace procession::bind
