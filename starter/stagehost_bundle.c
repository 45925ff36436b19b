/* Runs the modules that a stage begins with, in one go: the import system, which is Python itself,
 * would take as long to find each as the module takes to run. */
#include <Python.h>

#include <marshal.h>
#include <stdbool.h>
#include <string.h>

#include "frozen.h"

/* What an import looks at in a module that is there already. */
static PyObject *make_spec(PyObject *name) {
    PyObject *system = PyImport_AddModule("_frozen_importlib"); /* there already; borrowed */
    PyObject *spec = system ? PyObject_CallMethod(system, "ModuleSpec", "OO", name, Py_None) : NULL;
    if (spec && PyObject_SetAttrString(spec, "_initializing", Py_False) < 0)
        Py_CLEAR(spec);
    return spec;
}

/* Modules that are no packages share one spec: imports only ask it whether it is initialising. */
static int set_facts(PyObject *namespace, PyObject *name, int is_package, PyObject *shared) {
    if (PyDict_SetItemString(namespace, "__builtins__", PyEval_GetBuiltins()) < 0)
        return -1;
    if (!is_package)
        return PyDict_SetItemString(namespace, "__spec__", shared);
    PyObject *spec = make_spec(name), *path = PyList_New(0);
    int set = spec && path && PyDict_SetItemString(namespace, "__spec__", spec) == 0 &&
              PyObject_SetAttrString(spec, "submodule_search_locations", path) == 0 &&
              PyDict_SetItemString(namespace, "__path__", path) == 0;
    Py_XDECREF(path);
    Py_XDECREF(spec);
    return set ? PyDict_SetItemString(namespace, "__package__", name) : -1;
}

/* `import a.b` leaves b in a, which may run after b: a package imports what it is made of. */
static int set_in_package(const char *name, PyObject *module) {
    const char *dot = strrchr(name, '.');
    if (!dot)
        return 0;
    PyObject *above = PyUnicode_FromStringAndSize(name, dot - name);
    PyObject *package = above ? PyImport_AddModuleObject(above) : NULL; /* borrowed */
    int set = package ? PyObject_SetAttrString(package, dot + 1, module) : -1;
    Py_XDECREF(above);
    return set;
}

static int run_row(PyObject *row, PyObject *spec) {
    PyObject *name, *code;
    int is_package;
    if (!PyArg_ParseTuple(row, "UpO", &name, &is_package, &code))
        return -1;
    const char *text = PyUnicode_AsUTF8(name);
    PyObject *module = text ? PyImport_AddModuleObject(name) : NULL; /* borrowed */
    PyObject *namespace = module ? PyModule_GetDict(module) : NULL;
    if (!namespace || set_facts(namespace, name, is_package, spec) < 0)
        return -1;
    PyObject *result = PyEval_EvalCode(code, namespace, namespace);
    Py_XDECREF(result);
    return result ? set_in_package(text, module) : -1;
}

/* What the interpreter was linked with, as its import system would load it (PEP 489). */
static PyObject *make_builtin(const char *name, PyObject *spec) {
    const struct _inittab *row = PyImport_Inittab;
    while (row->name && strcmp(row->name, name) != 0)
        row++;
    if (!row->name || !row->initfunc)
        return PyErr_Format(PyExc_ImportError, "%s is not built into libpython", name);
    PyObject *made = row->initfunc();
    if (!made || !PyObject_TypeCheck(made, &PyModuleDef_Type))
        return made;
    PyModuleDef *definition = (PyModuleDef *)(void *)made; /* static: nobody owns it */
    PyObject *module = PyModule_FromDefAndSpec(definition, spec);
    if (module && (PyObject_SetAttrString(module, "__spec__", spec) < 0 ||
                   PyModule_ExecDef(module, definition) < 0))
        Py_CLEAR(module);
    return module;
}

int place_builtin(const char *name, const char *full_name) {
    PyObject *modules = PyImport_GetModuleDict();
    if (PyDict_GetItemString(modules, full_name))
        return 0; /* what was placed before has imported it */
    PyObject *text = PyUnicode_FromString(name), *spec = text ? make_spec(text) : NULL;
    PyObject *module = spec ? make_builtin(name, spec) : NULL;
    int placed = module ? PyDict_SetItemString(modules, full_name, module) : -1;
    Py_XDECREF(module);
    Py_XDECREF(spec);
    Py_XDECREF(text);
    return placed;
}

/* What the modules of a bundle import of CPython's own; `path` looks for `os`, which is ours. */
static int run_paths(void) {
    static const char *const builtin[] = {"posix", "_stat", "_struct"};
    static const char *const names[] = {"stat", "genericpath", "posixpath"};
    static bool done;
    if (done)
        return 0;
    done = true;
    if (!PyImport_AddModule("os"))
        return -1;
    for (size_t i = 0; i < sizeof(builtin) / sizeof(builtin[0]); i++)
        if (place_builtin(builtin[i], builtin[i]) < 0)
            return -1;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (PyImport_ImportFrozenModule(names[i]) <= 0)
            return -1;
    return 0;
}

PyObject *bundle_load(const struct bundle *bundle) {
    if (bundle->image)
        return image_load(bundle->image);
    return PyMarshal_ReadObjectFromString(bundle->data, bundle->size);
}

int bundle_run(const struct bundle *bundle) {
    if (run_paths() < 0)
        return -1;
    PyObject *rows = bundle_load(bundle);
    PyObject *name = rows ? PyUnicode_FromString("bundle") : NULL;
    PyObject *spec = name ? make_spec(name) : NULL;
    int result = spec ? 0 : -1;
    for (Py_ssize_t i = 0; result == 0 && i < PyTuple_GET_SIZE(rows); i++)
        result = run_row(PyTuple_GET_ITEM(rows, i), spec);
    Py_XDECREF(spec);
    Py_XDECREF(name);
    Py_XDECREF(rows);
    return result;
}
