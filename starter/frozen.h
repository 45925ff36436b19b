/* The modules of a stage, compiled in by tools/gen_frozen.py. */
#ifndef APY_FROZEN_H
#define APY_FROZEN_H

#include <Python.h>

/* A marshalled tuple of (name, is a package, code), in the order in which they are to be run. */
struct bundle {
    const char *data;
    Py_ssize_t size;
};

enum { BUNDLE_MASTER, BUNDLE_IMAGE, BUNDLE_START, BUNDLE_OCI };

extern const struct _frozen frozen_modules[];
extern const struct bundle bundles[];

/* Run the modules of a bundle without the import system; -1 and an exception if one fails. */
int bundle_run(const struct bundle *bundle);

#endif
