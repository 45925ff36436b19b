/* Bundles that need no unmarshalling: tools/code_image.py has laid their objects out as they lie in
 * memory, and here they get their addresses.  It is about the structures of CPython 3.11. */
#include <Python.h>

#include <stddef.h>
#include <string.h>

#include "frozen.h"

#if PY_VERSION_HEX >> 16 == 0x030b

_Static_assert(offsetof(PyCodeObject, co_consts) == 24 && offsetof(PyCodeObject, co_flags) == 48 &&
                   offsetof(PyCodeObject, co_localsplusnames) == 96 &&
                   offsetof(PyCodeObject, _co_firsttraceable) == 168 &&
                   offsetof(PyCodeObject, co_code_adaptive) == 184,
               "tools/code_image.py does not fit PyCodeObject");
_Static_assert(sizeof(PyASCIIObject) == 48 && sizeof(PyCompactUnicodeObject) == 72 &&
                   offsetof(PyBytesObject, ob_sval) == 32 && offsetof(PyTupleObject, ob_item) == 24,
               "tools/code_image.py does not fit the other structures");

/* What a slot names until its address is known. */
struct reference {
    uint32_t number, table;
};
enum { INSIDE, OUTSIDE, NAME };

/* Where the interpreter has an equal string among its names already, that one is used. */
static PyObject **intern_names(char *base, const struct image *image) {
    PyObject **names = PyMem_Malloc((image->name_count + 1) * sizeof(*names));
    for (uint32_t i = 0; names && i < image->name_count; i++) {
        names[i] = (PyObject *)(void *)(base + image->names[i]);
        Py_SET_TYPE(names[i], &PyUnicode_Type);
        PyUnicode_InternInPlace(&names[i]);
    }
    return names;
}

static void put_addresses(char *base, const struct image *image, PyObject *const *names) {
    /* In the order of _OUTSIDE_OBJECTS. */
    PyObject *const outside[] = {
        (PyObject *)&PyUnicode_Type, (PyObject *)&PyBytes_Type, (PyObject *)&PyLong_Type,
        (PyObject *)&PyFloat_Type,   (PyObject *)&PyTuple_Type, (PyObject *)&PyCode_Type,
        Py_None,                     Py_True,                   Py_False,
        Py_Ellipsis};
    char *place = base;
    for (uint32_t i = 0; i < image->slot_count; i++) {
        struct reference what;
        place += 8 * (size_t)image->gaps[i];
        memcpy(&what, place, sizeof(what));
        PyObject *object = what.table == INSIDE    ? (PyObject *)(void *)(base + what.number)
                           : what.table == OUTSIDE ? outside[what.number]
                                                   : names[what.number];
        memcpy(place, &object, sizeof(object));
    }
}

static int make_sets(char *base, const struct image *image) {
    for (uint32_t i = 0; i < image->set_count; i++) {
        PyObject *items = (PyObject *)(void *)(base + image->sets[i].items);
        PyObject *set = PyFrozenSet_New(items);
        if (!set)
            return -1;
        memcpy(base + image->sets[i].slot, &set, sizeof(set));
    }
    return 0;
}

PyObject *image_load(const struct image *image) {
    char *base = stage_memory(image->size);
    if (!base)
        return PyErr_NoMemory();
    memcpy(base, image->data, image->size);
    PyObject **names = intern_names(base, image);
    if (!names)
        return PyErr_NoMemory();
    put_addresses(base, image, names);
    PyMem_Free(names);
    return make_sets(base, image) < 0 ? NULL : (PyObject *)(void *)(base + image->root);
}

#else

PyObject *image_load(const struct image *image) {
    PyErr_SetString(PyExc_SystemError, "no image fits this interpreter");
    return image ? NULL : NULL;
}

#endif
