/* The modules of a stage, compiled in by tools/gen_frozen.py. */
#ifndef APY_FROZEN_H
#define APY_FROZEN_H

#include <Python.h>

/* Objects in one piece of memory (tools/code_image.py).  `gaps` lead from one address that is to be
 * put in to the next, in units of eight bytes; `names` are the strings to intern; a set is made of
 * the items of a tuple. */
struct image {
    const char *data;
    size_t size;
    uint32_t root, slot_count, name_count, set_count;
    const uint16_t *gaps;
    const uint32_t *names;
    const struct image_set {
        uint32_t slot, items;
    } *sets;
};

/* A tuple of (name, is a package, code), in the order in which they are to be run: marshalled, or
 * as an image where the interpreter is one that images are made for. */
struct bundle {
    const char *data;
    Py_ssize_t size;
    const struct image *image;
};

enum {
    BUNDLE_MASTER,
    BUNDLE_IMAGE,
    BUNDLE_START,
    BUNDLE_OCI,
    BUNDLE_OCI_EXEC,
    BUNDLE_OCI_CREATE
};

/* Memory that is never given back, all of which will be written to; NULL if there is none. */
void *stage_memory(size_t size);

extern const struct _frozen frozen_modules[];
extern const struct bundle bundles[];

/* Load a built-in module, which may be a package's under its full name, without the import system;
 * -1 and an exception. */
int place_builtin(const char *name, const char *full_name);
/* The root object of an image, each of which is loaded at most once; NULL and an exception. */
PyObject *image_load(const struct image *image);
/* The rows of a bundle; a new reference, or NULL and an exception. */
PyObject *bundle_load(const struct bundle *bundle);
/* Run the modules of a bundle without the import system; -1 and an exception if one fails. */
int bundle_run(const struct bundle *bundle);

#endif
